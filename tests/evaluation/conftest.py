"""Makes the writers of tiny data sets in tests/data importable here."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "data"))
