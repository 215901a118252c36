"""Starting the processes of a run: on this machine, watched over, or as a job file for Slurm or Kubernetes."""
