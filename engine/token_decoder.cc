#include "engine/token_decoder.h"

#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "engine/bpe.h"
#include "engine/utf8.h"
#include "kernels/check.h"

namespace resa::engine {
namespace {

using Step = TokenDecoderConfig::Step;

std::string ReplaceAll(absl::string_view text, absl::string_view pattern,
                       absl::string_view content) {
  return absl::StrReplaceAll(text, {{pattern, content}});
}

std::string ApplyStep(const Step& step, std::string token, bool first) {
  switch (step.kind) {
    case Step::Kind::kReplace:
      return ReplaceAll(token, step.pattern, step.content);
    case Step::Kind::kMetaspace:
      return ReplaceAll(token, step.pattern, first && step.drop_first ? "" : " ");
    case Step::Kind::kStrip: {
      absl::string_view rest = token;
      for (int64_t i = 0; i < step.start && absl::StartsWith(rest, step.pattern); ++i) {
        rest.remove_prefix(step.pattern.size());
      }
      for (int64_t i = 0; i < step.stop && absl::EndsWith(rest, step.pattern); ++i) {
        rest.remove_suffix(step.pattern.size());
      }
      return std::string(rest);
    }
  }
  return token;
}

}  // namespace

TokenDecoder::TokenDecoder(TokenDecoderConfig config, const std::vector<std::string>& tokens)
    : config_(std::move(config)), pieces_(tokens.size()) {
  const auto add = [this](absl::string_view text, uint32_t* offset, uint32_t* length) {
    RESA_CHECK_LT(bytes_.size() + text.size(), size_t{UINT32_MAX});
    *offset = static_cast<uint32_t>(bytes_.size());
    *length = static_cast<uint32_t>(text.size());
    absl::StrAppend(&bytes_, text);
  };
  for (size_t id = 0; id < tokens.size(); ++id) {
    Piece& piece = pieces_[id];
    piece.exists = !tokens[id].empty();
    if (!piece.exists) continue;
    if (config_.kind == TokenDecoderConfig::Kind::kByteLevel) {
      // A token with other characters than GPT-2's alphabet (an added one) stands for itself.
      add(ByteLevelBytes(tokens[id]).value_or(tokens[id]), &piece.offset, &piece.length);
    } else {
      std::string text = tokens[id];
      std::string first = text;
      for (const Step& step : config_.steps) {
        text = ApplyStep(step, std::move(text), false);
        first = ApplyStep(step, std::move(first), true);
      }
      const std::optional<uint8_t> byte = Bpe::FallbackByte(text);
      piece.is_fallback_byte = config_.byte_fallback && byte.has_value();
      if (piece.is_fallback_byte) text = first = std::string(1, static_cast<char>(*byte));
      add(text, &piece.offset, &piece.length);
      if (first != text) {
        add(first, &piece.first_offset, &piece.first_length);
        continue;
      }
    }
    piece.first_offset = piece.offset;
    piece.first_length = piece.length;
  }
}

DecodeStream::DecodeStream(const TokenDecoder* decoder, size_t max_held_bytes)
    : decoder_(decoder),
      max_held_bytes_(max_held_bytes),
      strip_left_(decoder->config_.strip_text_count) {}

void DecodeStream::Push(int32_t id, std::string* out) {
  if (id < 0 || static_cast<size_t>(id) >= decoder_->pieces_.size()) return;
  const TokenDecoder::Piece& piece = decoder_->pieces_[id];
  if (!piece.exists) return;
  const absl::string_view text = decoder_->Text(piece, first_);
  switch (decoder_->config_.kind) {
    case TokenDecoderConfig::Kind::kByteLevel:
      PushByteLevel(text, out);
      break;
    case TokenDecoderConfig::Kind::kSteps:
      if (piece.is_fallback_byte) {
        PushFallbackByte(text[0], out);
      } else {
        FlushRun(out);
        Emit(text, out);
      }
      break;
    case TokenDecoderConfig::Kind::kNone:
      if (!first_) out->push_back(' ');
      absl::StrAppend(out, text);
      break;
  }
  first_ = false;
}

void DecodeStream::PushByteLevel(absl::string_view bytes, std::string* out) {
  std::string joined;
  if (!held_.empty()) {
    joined = absl::StrCat(held_, bytes);
    bytes = joined;
  }
  // Whether the end is an unfinished character shows in its last three bytes at the latest.
  size_t whole = bytes.size();
  for (size_t back = 1; back <= 3 && back <= bytes.size(); ++back) {
    const auto byte = static_cast<unsigned char>(bytes[bytes.size() - back]);
    if ((byte & 0xC0) == 0x80) continue;
    const absl::string_view tail = bytes.substr(bytes.size() - back);
    if (ReadUtf8(tail).kind == Utf8Unit::Kind::kIncomplete) whole = bytes.size() - back;
    break;
  }
  AppendReplacingIllFormed(bytes.substr(0, whole), out);
  held_ = std::string(bytes.substr(whole));
}

void DecodeStream::PushFallbackByte(char byte, std::string* out) {
  if (run_is_ill_formed_) {
    Emit(kReplacementCharacter, out);
    return;
  }
  held_.push_back(byte);
  const Utf8Unit unit = ReadUtf8(absl::string_view(held_).substr(held_valid_));
  if (unit.kind == Utf8Unit::Kind::kCharacter) {
    held_valid_ = held_.size();
  } else if (unit.kind == Utf8Unit::Kind::kIllFormed) {
    // Nothing that follows can make the run valid again.
    run_is_ill_formed_ = true;
    for (size_t i = 0; i < held_.size(); ++i) Emit(kReplacementCharacter, out);
    held_.clear();
    held_valid_ = 0;
  }
  if (held_.size() >= max_held_bytes_) {
    Emit(absl::string_view(held_).substr(0, held_valid_), out);
    held_.erase(0, held_valid_);
    held_valid_ = 0;
  }
}

void DecodeStream::FlushRun(std::string* out) {
  if (held_valid_ == held_.size()) {
    Emit(held_, out);
  } else {
    for (size_t i = 0; i < held_.size(); ++i) Emit(kReplacementCharacter, out);
  }
  held_.clear();
  held_valid_ = 0;
  run_is_ill_formed_ = false;
}

void DecodeStream::Emit(absl::string_view text, std::string* out) {
  const absl::string_view character = decoder_->config_.strip_text;
  while (strip_left_ > 0 && absl::StartsWith(text, character)) {
    text.remove_prefix(character.size());
    --strip_left_;
  }
  if (!text.empty()) strip_left_ = 0;
  absl::StrAppend(out, text);
}

void DecodeStream::Finish(std::string* out) {
  if (decoder_->config_.kind == TokenDecoderConfig::Kind::kByteLevel) {
    AppendReplacingIllFormed(held_, out);
    held_.clear();
  } else {
    FlushRun(out);
  }
}

}  // namespace resa::engine
