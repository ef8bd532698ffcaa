"""How a step is measured: clocks, memory, launches, other load, and the runner of a bench."""
