"""The rehearsal trains with the narrow teachers that the tests of models have."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "models"))
