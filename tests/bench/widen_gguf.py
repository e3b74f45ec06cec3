"""Widens the matrices of a GGUF file, whatever they are quantised to, into bf16 or f16.

    widen_gguf.py IN {bf16|f16} OUT

Vectors (norms, biases) become f32, as llama.cpp wants them; metadata stay as they are but for the
file's type. Both programs then compute with the same numbers, rounded once.
"""

import sys

import gguf
import numpy
from gguf.quants import dequantize, quantize

TYPES = {
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
}
# Written by GGUFWriter itself, or anew below.
SKIPPED = {"general.architecture", "general.file_type", "general.quantization_version"}


def copy_metadata(reader, writer):
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in SKIPPED:
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, element)


def main(arguments):
    if len(arguments) != 3 or arguments[1] not in TYPES:
        sys.exit("usage: widen_gguf.py IN {bf16|f16} OUT")
    source, name, target = arguments
    matrix_type, file_type = TYPES[name]
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    copy_metadata(reader, writer)
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        # Dimensions in the file have the contiguous one first.
        values = values.reshape([int(n) for n in reversed(tensor.shape)])
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values.astype(numpy.float32))
        else:
            writer.add_tensor(tensor.name, quantize(values, matrix_type), raw_dtype=matrix_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(sys.argv[1:])
