"""The GPU network: is GPUDirect RDMA used (doctor), which settings use it well (env), how fast is it (bench).

    recording ← collect                  what a node's commands and /sys print, live or from a folder
    facts ← topology, nics, host,        each file parsed
            nccl_variables, nccl_log
    diagnose ← rails, checks,            findings with remedies, a verdict for each GPU with its network card
               node_checks
    cluster → environment                NCCL's variables and XLA's flags for a described cluster
    collectives → bench → links          times of collectives, latency and bandwidth fitted, in a file for planning

The commands: python -m parallel.network --help
"""
