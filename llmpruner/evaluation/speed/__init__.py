"""Speed: prefill and decoding of several models in one program, against what their sizes allow."""
