"""`make quickstart-long`: the quickstart's pipeline with a real budget.

    llada2 quickstart --config=configs/quickstart_long.py

Trains the parent from scratch first, then converts it with nine times the quickstart's tokens. The
parent that ships, llada2_jax/assets/tiny_ar, is a copy of its runs/quickstart-long/tiny_ar. Hours
on two CPU cores; stop and start it as you like, every stage resumes. The committed report is
docs/quickstart-long/report.md.
"""

from pathlib import Path

from llada2_jax.config import load_config

HERE = Path(__file__).parent


def get_config():
    config = load_config(HERE / "quickstart.py")
    config.workdir = "runs/quickstart-long"
    config.train_parent = True
    config.ar.schedule.ar_tokens = 200_000
    config.conversion = load_config(HERE / "tiny_wsd.py")
    config.merge_top_k = 4
    config.report.eval_rows = 128
    config.report.eval_samples = 4
    config.report.exact_rows = 8
    config.report.prompts = 8
    config.report.max_new_tokens = 128
    return config
