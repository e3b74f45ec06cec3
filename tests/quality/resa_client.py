"""The daemon's gRPC interface for Python: stubs made from proto/ at start, one call as a value."""

import dataclasses
import importlib
import importlib.resources
import pathlib
import sys
import tempfile
import time

import grpc
from grpc_tools import protoc

_PROTO = pathlib.Path(__file__).resolve().parents[2] / "proto"


def _load_stubs():
    files = ["resa/v1/attention.proto", "resa/v1/inference.proto"]
    with tempfile.TemporaryDirectory(prefix="resa-stubs-") as out:
        known = importlib.resources.files("grpc_tools") / "_proto"
        arguments = [f"-I{_PROTO}", f"-I{known}", f"--python_out={out}", f"--grpc_python_out={out}"]
        if protoc.main(["protoc", *arguments, *files]) != 0:
            raise SystemExit(f"error: could not compile {files} in {_PROTO}")
        sys.path.insert(0, out)
        try:
            modules = [
                importlib.import_module(f"resa.v1.{name}")
                for name in ("attention_pb2", "inference_pb2", "inference_pb2_grpc")
            ]
        finally:
            sys.path.remove(out)
    return modules


attention_pb2, inference_pb2, inference_pb2_grpc = _load_stubs()


@dataclasses.dataclass
class Output:
    """What one Generate call gave."""

    token_ids: list
    text: str
    stopped: bool  # by end of sequence, not by max_tokens
    first_token_s: float
    decode_s: float
    queued_s: float
    sparse_steps: int
    dense_steps: int
    rectifications: int
    kept_block_ratio: float
    preemptions: int


def _seconds(duration):
    return duration.seconds + duration.nanos * 1e-9


class Client:
    """Threads may share one."""

    def __init__(self, target):
        self._channel = grpc.insecure_channel(
            target, options=[("grpc.max_receive_message_length", 64 << 20)]
        )
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    def model(self, wait_s=10.0):
        """GetModel, waiting for the daemon to come up."""
        end = time.monotonic() + wait_s
        while True:
            try:
                return self._stub.GetModel(inference_pb2.GetModelRequest(), timeout=5)
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE or time.monotonic() > end:
                    raise
                time.sleep(0.2)

    def generate(self, request):
        """Runs a GenerateRequest with one output to its end."""
        ids, text, finished = [], [], None
        for event in self._stub.Generate(request):
            if event.HasField("delta"):
                ids.extend(event.delta.token_ids)
                text.append(event.delta.text)
            elif event.HasField("finished"):
                finished = event.finished
        if finished is None:
            raise RuntimeError("the stream ended without Finished")
        timings, attention = finished.timings, finished.attention
        return Output(
            token_ids=ids,
            text="".join(text),
            stopped=finished.reason == inference_pb2.FINISH_REASON_STOP,
            first_token_s=_seconds(timings.first_token),
            decode_s=_seconds(timings.decode),
            queued_s=_seconds(timings.queued),
            sparse_steps=attention.sparse_steps,
            dense_steps=attention.dense_steps,
            rectifications=attention.rectifications,
            kept_block_ratio=attention.kept_block_ratio,
            preemptions=finished.usage.preemptions,
        )
