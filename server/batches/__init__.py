"""Files of lines in, files of records out: `everstep batch`, /v1/files and /v1/batches."""
