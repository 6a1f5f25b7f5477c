"""Running a decoder layer by layer, and measuring its inputs, outputs and gradients."""
