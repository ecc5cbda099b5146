"""Print the scores of the follow-ups for a model folder of cmg_pretrain.py."""

from __future__ import annotations

import argparse
import json
import sys

from cmg.command import seed
from cmg.errors import DataError
from cmg.run import TrainedRun
from cmg.sources import open_data

from . import all_followups

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", help="the --output of cmg_pretrain.py")
parser.add_argument("--data", default="digits", help="as in cmg_pretrain.py")
parser.add_argument("--modalities", nargs="+", metavar="NAME", help="as in cmg_pretrain.py")
parser.add_argument("--seed", type=seed, default=0, help="of the tasks")
args = parser.parse_args()
try:
    _, clips = open_data(args.data, args.modalities)
    run = TrainedRun.load(args.folder, clips, args.seed)
except DataError as error:
    sys.exit(f"followups: {error}")
print(json.dumps({name: task(run) for name, task in all_followups.items()}, indent=2))
