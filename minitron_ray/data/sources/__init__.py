"""Where text comes from: one plug-in a file, named by `data.source.kind`."""
