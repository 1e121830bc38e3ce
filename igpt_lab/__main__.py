"""python -m igpt_lab is the command igpt-lab."""

import sys

from igpt_lab.app.cli import main

sys.exit(main())
