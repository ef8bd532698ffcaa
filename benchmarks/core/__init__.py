"""What a benchmark is made of: cases, floors, what a result was measured on."""
