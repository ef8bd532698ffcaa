"""The only files that import other PEFT libraries. Nothing here is imported until it is asked for."""
