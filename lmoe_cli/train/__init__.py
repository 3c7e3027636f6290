"""Train experts and the gate between them: what comes out is a recipe that runs."""
