"""Base and tuned model on the same held-out rows; prints both reports.

ray job submit --working-dir . -- python jobs/evaluate.py --config jobs/sft.yaml --store URI --set key=value
"""

import sys

from forge_ray import pipeline
from forge_ray.cli.job import main
from forge_ray.config.run import RunConfig

if __name__ == "__main__":
    sys.exit(main(RunConfig, pipeline.evaluate))
