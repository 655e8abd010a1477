"""tpcompile beside what people would use instead, and beside a reference written by hand."""
