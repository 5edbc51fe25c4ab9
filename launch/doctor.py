"""Say what works on this machine, what is missing and how to mend it.

    python launch/doctor.py [--json]

Exit status: 0 when the main job can run on this machine's CPU, 1 otherwise. argparse rather than typer, because doctor
has to run where typer is missing.
"""

import sys
from pathlib import Path

try:
    from megatron_fwpkm import doctor
except ModuleNotFoundError:  # not installed: then it is this very folder's copy that should speak
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from megatron_fwpkm import doctor

if __name__ == "__main__":
    sys.exit(doctor.main())
