"""Measuring this machine: how much it holds and how fast its lanes are.

`sampling` repeats and times; `link`, `host_memory`, `drive` and `compute` each know one thing to measure and how a step uses it;
`capacities` and `identity` ask the kernel and the driver; `machine` puts them together into a `MachineFile`, and `cache` keeps that.
`runtime.rates`, which looks at a session's own lanes, measures with the same routines.
"""
