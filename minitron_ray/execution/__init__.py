"""Where things run: the only package that imports ray. It calls functions; it knows no mechanism.

Ray reads some of its environment when it is imported, so the defaults are set here, before any
module of this package can import it. What the user has set stays.
"""

import os

for _name, _value in {
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune prints a configuration box otherwise, whatever its verbosity
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # 2 s would be added to every start, end and loss of a worker
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",  # a group that can't be placed is tried again by us
    # A worker that answers nothing for so long is lost: its node hangs, or the network to it is cut.
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    # It would tell workers of a node that is to be taken away. Those that get SIGTERM themselves, as under Slurm, save
    # first; those that end with their node do not, and a group goes on from the last checkpoint.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # our tables are the record
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is StopSignal's
    # Of a Ray that is started here: workers that wait for work are kept, besides a search's own, so that the next
    # stage need not import everything again.
    "RAY_num_workers_soft_limit": str((os.cpu_count() or 1) + 3),
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread of Ray's that outlives a lost cluster would start another
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}.items():
    os.environ.setdefault(_name, _value)
