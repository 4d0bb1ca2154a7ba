"""The smallest setting that keeps what a model says of a user's own text: `sparsekv calibrate`."""
