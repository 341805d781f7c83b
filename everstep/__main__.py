"""`python -m everstep`: the same as the console script."""

import sys

# run from a checkout, the root on sys.path would hide other packages behind our folders
# (`kernels`, say), so it goes to the end
if sys.path and sys.path[0] not in ("", None):
    sys.path.append(sys.path.pop(0))

from everstep.entry import main

if __name__ == "__main__":
    main()
