"""The task and the model of `everstep train --demo`."""
