"""How work meets the machine: memory, batches, clocks."""
