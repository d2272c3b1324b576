"""`value_and_grad`, `grad`: a sequence in windows, with memory flat in time."""
