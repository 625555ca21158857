"""How many examples property tests have; `make fuzz` asks for thousands of them."""

import os

FUZZING = "PIVOT_FUZZ" in os.environ
# examples per property: few in `make test`, PIVOT_FUZZ of them in `make fuzz`
EXAMPLES = int(os.environ.get("PIVOT_FUZZ", "200"))
