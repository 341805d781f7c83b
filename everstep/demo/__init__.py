"""`everstep train --demo`: a whole RL run from one command."""
