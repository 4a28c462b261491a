#include "launch/plan_options.hpp"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <vector>

#include "kernels/error.hpp"
#include "launch/number_option.hpp"
#include "launch/parse.hpp"
#include "runtime/rates_file.hpp"
#include "sharding/block_forward.hpp"
#include "sharding/head_layout.hpp"
#include "sharding/mesh.hpp"
#include "sharding/named_sharding.hpp"
#include "sharding/simulate.hpp"

namespace annulus::launch {
namespace {

// Beyond them a plan would take longer than minutes, and pairs of tokens no longer fit 63 bits.
constexpr std::int64_t kMostRanks = 1 << 20;
constexpr std::int64_t kMostTokens = std::int64_t{1} << 31;

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  std::size_t begin = 0;
  while (begin <= text.size()) {
    const std::size_t end = std::min(text.find(separator, begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

std::int64_t parse_number(const std::string& text, const std::string& where) {
  std::int64_t number = 0;
  require(read_whole(text, number), ExitCode::usage, "plan: {}: \"{}\" is no whole number", where,
          text);
  return number;
}

std::vector<std::int64_t> parse_numbers(const std::string& text, const std::string& where) {
  std::vector<std::int64_t> numbers;
  for (const std::string& part : split(text, ',')) numbers.push_back(parse_number(part, where));
  return numbers;
}

std::vector<std::int64_t> random_offsets(const std::vector<std::int64_t>& count_and_seed,
                                         std::int64_t seq) {
  require(count_and_seed.size() <= 2 && count_and_seed[0] > 0 &&
              count_and_seed[0] <= std::max<std::int64_t>(seq, 1),
          ExitCode::usage,
          "plan: random-documents takes COUNT or COUNT,SEED, COUNT from 1 to the {} tokens", seq);
  std::mt19937_64 random(count_and_seed.size() == 2 ? static_cast<std::uint64_t>(count_and_seed[1])
                                                    : 1);
  std::vector<std::int64_t> offsets{0, seq};
  for (std::int64_t i = 1; i < count_and_seed[0]; ++i) {
    offsets.push_back(static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(seq + 1)));
  }
  std::sort(offsets.begin(), offsets.end());
  return offsets;
}

void add_mask_part(const std::string& part, std::int64_t seq_q, std::int64_t seq_kv,
                   AttentionMask& mask) {
  const std::size_t colon = std::min(part.find(':'), part.size());
  const std::string kind = part.substr(0, colon);
  const std::string values = colon < part.size() ? part.substr(colon + 1) : "";
  const auto set_documents = [&](const std::vector<std::int64_t>& offsets) {
    mask.q_segments = {segments_of_offsets(offsets, seq_q)};
    mask.kv_segments = {segments_of_offsets(offsets, seq_kv)};
  };
  if (kind == "full") return;
  if (kind == "causal") {
    mask.causal = true;
  } else if (kind == "window") {
    const std::vector<std::int64_t> sides = parse_numbers(values, "window");
    require(sides.size() == 2, ExitCode::usage, "plan: window takes L,R, not \"{}\"", values);
    mask.window_left = sides[0];
    mask.window_right = sides[1];
  } else if (kind == "prefix") {
    mask.prefix_lengths = {parse_number(values, "prefix")};
  } else if (kind == "documents") {
    set_documents(parse_numbers(values, "documents"));
  } else if (kind == "random-documents") {
    set_documents(
        random_offsets(parse_numbers(values, "random-documents"), std::min(seq_q, seq_kv)));
  } else {
    throw Error(ExitCode::usage,
                fmt::format("plan: no mask \"{}\"; there are full, causal, window:L,R, prefix:N, "
                            "documents:0,N,…, random-documents:COUNT",
                            kind));
  }
}

SequenceLayout layout_of(const std::string& name, const MaskSlices& mask, std::int64_t batch,
                         std::int64_t seq, int ranks) {
  if (name == "contiguous") return SequenceLayout::contiguous(seq, ranks);
  if (name == "zigzag") return SequenceLayout::zigzag(seq, ranks);
  return SequenceLayout::balanced(mask, batch, seq, ranks);
}

// Axis sizes whose product is not given by a launcher: the product of what the text says.
int product_of(const std::string& mesh) {
  std::int64_t product = 1;
  for (const std::string& part : split(mesh, ',')) {
    const std::size_t equals = part.find('=');
    std::int64_t size = 0;
    const bool whole =
        equals != std::string::npos && read_whole(std::string_view(part).substr(equals + 1), size);
    require(whole && size >= 1 && size <= kMostRanks / product, ExitCode::usage,
            "plan: mesh {} needs axis sizes of 1 or more and {} ranks at most", mesh, kMostRanks);
    product *= size;
  }
  return static_cast<int>(product);
}

// Pairs and the bytes that all ranks send are counted in 63 bits.
void require_countable(const PlanOptions& options, double q_heads, double seq_kv, double ranks) {
  const auto batch = static_cast<double>(options.batch);
  const auto seq_q = static_cast<double>(options.seq_q);
  const double pairs = batch * q_heads * seq_q * seq_kv;
  // Gradients and states travel in fp32, at most six such tensors.
  const double bytes = batch * q_heads * std::max(seq_q, seq_kv) *
                       static_cast<double>(options.head_dim) * 24.0 * ranks;
  require(
      std::max(pairs, bytes) < 0x1p62, ExitCode::usage,
      "plan: --batch {} --heads {} --seq-q {} --seq-kv {} --head-dim {} over {} ranks make {:.3g} "
      "pairs and up to {:.3g} bytes on the way; accepted: {:.3g} of each",
      options.batch, options.heads, options.seq_q, seq_kv, options.head_dim, ranks, pairs, bytes,
      0x1p62);
}

}  // namespace

std::optional<PlanOptions> parse_plan_options(Arguments arguments) {
  PlanOptions options;
  CLI::App app("Predicts and draws how ranks would share an attention.", "annulus plan");
  app.option_defaults()->always_capture_default();
  app.add_option("--op", options.operation, "ring, all_gather, ulysses, hybrid or auto");
  app.add_option("--mesh", options.mesh, "axis sizes such as sp=8,tp=2");
  app.add_option("--seq,--seq-q", options.seq_q, "query tokens")
      ->check(whole_number<>(0, kMostTokens));
  app.add_option("--seq-kv", options.seq_kv, "key tokens; 0: as many as queries")
      ->check(whole_number<>(0, kMostTokens));
  app.add_option("--batch", options.batch, "batch rows")->check(whole_number<>(1));
  app.add_option("--heads", options.heads, "query heads, or query:KV heads such as 64:8");
  app.add_option("--head-dim", options.head_dim, "elements of a head")->check(whole_number<>(1));
  app.add_option("--dtype", options.dtype, "of the tensors")
      ->check(CLI::IsMember({"f32", "bf16", "f16"}));
  app.add_option("--mask", options.mask,
                 "parts joined by +: full, causal, window:L,R, prefix:N, documents:0,N,..., "
                 "random-documents:COUNT");
  app.add_option("--layout", options.layout, "how rows are dealt")
      ->check(CLI::IsMember({"contiguous", "zigzag", "balanced"}));
  app.add_option("--rates", options.rates, "h100, cpu, or a file that `bench ring` wrote");
  app.add_flag("--backward", options.backward, "plan the backward pass too");
  app.add_flag("--reproducible", options.reproducible, "the same bits for any number of ranks");
  app.add_option("--svg", options.svg, "draw the plan into this file");
  app.add_flag("--json", options.json, "print for machines");
  if (!parse(app, arguments)) return std::nullopt;
  return options;
}

AttentionMask parse_mask(const std::string& text, std::int64_t seq_q, std::int64_t seq_kv) {
  AttentionMask mask;
  for (const std::string& part : split(text, '+')) add_mask_part(part, seq_q, seq_kv, mask);
  return mask;
}

Rates parse_rates(const std::string& text) {
  if (text == "h100") return default_rates(Device::cuda);
  if (text == "cpu") return default_rates(Device::cpu);
  require(std::ifstream(text).good(), ExitCode::missing_input,
          "plan: no rates \"{}\"; accepted: h100, cpu, or a file that `annulus bench ring` wrote",
          text);
  return read_rates(text);
}

PlannedAttention plan_attention(const PlanOptions& options) {
  const auto [q_heads, kv_heads] = parse_heads(options.heads, "plan");
  const Mesh mesh = Mesh::parse(options.mesh, product_of(options.mesh));
  const int ranks = mesh.size("sp");
  const int batch_parts = mesh.size(AxisTuple{"fsdp", "dp"});
  const HeadLayout head_parts(q_heads, kv_heads, mesh.size("tp"));
  const std::int64_t seq_kv = options.seq_kv > 0 ? options.seq_kv : options.seq_q;
  require_countable(options, static_cast<double>(q_heads), static_cast<double>(seq_kv),
                    static_cast<double>(mesh.ranks()));

  auto request = std::make_shared<PlanRequest>();
  request->batch = split_evenly(options.batch, batch_parts, 0).size();
  request->mask = make_slices(parse_mask(options.mask, options.seq_q, seq_kv), request->batch,
                              options.seq_q, seq_kv);
  request->q_layout =
      layout_of(options.layout, request->mask, request->batch, options.seq_q, ranks);
  if (options.reproducible) {
    request->block_rows = reproducible_block_rows(seq_kv);
    request->q_block_rows = reproducible_query_rows(options.seq_q);
    request->q_layout = request->q_layout.aligned(request->q_block_rows);
  }
  request->kv_layout =
      options.seq_q == seq_kv ? request->q_layout : SequenceLayout::contiguous(seq_kv, ranks);
  request->q_heads = head_parts.q_heads(0).size();
  request->kv_heads = head_parts.kv_heads(0).size();
  request->group_size = head_parts.groups(0).group_size;
  request->q_head_offset = head_parts.groups(0).q_head_offset;

  PlannedAttention planned{
      request, {}, parse_rates(options.rates), mesh.to_string(), mesh.ranks() / ranks};
  planned.sizes.head_dim = planned.sizes.value_dim = options.head_dim;
  planned.sizes.element_bytes = size_bytes(*parse_dtype(options.dtype));
  if (options.operation == "auto") {
    planned.request = choose_scheme(*request, planned.sizes, planned.rates, options.backward);
    return planned;
  }
  const std::optional<Scheme> scheme = parse_scheme(options.operation);
  require(scheme.has_value(), ExitCode::usage,
          "plan: no plan for \"{}\"; there are ring, all_gather, ulysses, hybrid, auto",
          options.operation);
  request->scheme = *scheme;
  request->node_ranks = std::min(planned.rates.node_ranks, ranks);
  return planned;
}

}  // namespace annulus::launch
