PROTOS := $(wildcard protos/granatum/v1/*.proto)
PY ?= .venv/bin/python

.PHONY: stubs
stubs:  ## regenerate the stubs beside the protos
	$(PY) -m grpc_tools.protoc -Iprotos --plugin=protoc-gen-mypy=$(dir $(PY))protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=$(dir $(PY))protoc-gen-mypy_grpc \
	  --python_out=protos --grpc_python_out=protos --mypy_out=protos --mypy_grpc_out=protos $(PROTOS)
