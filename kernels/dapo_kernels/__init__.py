"""The policy loss of DAPO. `reference` is the mathematics in plain torch; what is faster must agree with it."""
