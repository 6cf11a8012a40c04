"""The places where runs execute: this machine, or elsewhere. `registry` lists them."""
