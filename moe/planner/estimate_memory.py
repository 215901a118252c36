def estimate_memory(job, chip, devices_per_node):
    from parallel.layout import Layout
    from moe.train.state import make_blueprint
    from moe.train.pipelined import check_stages
    from moe.planner.estimate_stub import mesh_of
    from moe.model.moe_layer import chunk_limit
    l=Layout(mesh_of(job.mesh),job.layout)
    b=make_blueprint(job.model,job.precision,job.execution,job.optimizer,l,steps=job.steps)
    b.abstract_state()
    check_stages(job.model,l.stages,job.virtual_stages)
