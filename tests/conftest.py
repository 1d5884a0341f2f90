"""Test helpers are modules beside the tests; this makes them importable by name."""

import sys
from pathlib import Path

for folder in (".", "runtime", "architectures", "durability", "overlap", "optim", "activations"):
    sys.path.insert(0, str(Path(__file__).parent / folder))
