"""``python -m captum_m2ib`` is ``captum-m2ib``."""

import sys

from captum_m2ib.cli import main

sys.exit(main())
