"""Commands built on the core: sweeps, reports, tables, plans, exports."""
