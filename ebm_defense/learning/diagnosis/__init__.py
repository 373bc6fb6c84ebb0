"""Whether an energy's chains converge, and how far what was learned is from the truth."""
