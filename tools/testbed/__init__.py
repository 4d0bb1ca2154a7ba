"""How the testbed's model was trained, and its dense accuracy measured: see the README beside this file."""
