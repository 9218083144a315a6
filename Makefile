# Short names for ./run, which needs no make.
.PHONY: demo test lint setup ci
demo test lint setup:
	./run $@
ci:
	.ci/run
