"""What a step of decoding is made of beside products of matrices, compiled for the processor that it runs on."""
