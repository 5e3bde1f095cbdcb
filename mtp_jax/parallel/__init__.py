"""The mesh, shardings, rows split over devices, and batches put onto devices."""
