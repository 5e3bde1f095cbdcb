"""Parallelism: the mesh, shardings, rows split over devices, batches put onto them."""
