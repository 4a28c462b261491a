#include "launch/plan_svg.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <vector>

#include "launch/report.hpp"

namespace annulus::launch {
namespace {

constexpr double kMaskLeft = 60.0;
constexpr double kMaskTop = 130.0;
constexpr double kMaskSide = 480.0;
constexpr double kLanesLeft = 640.0;
constexpr double kLanesWidth = 720.0;
constexpr double kWidth = 1400.0;
constexpr double kTrafficTop = 680.0;
// Beyond so many shapes the mask is drawn line by line instead.
constexpr std::size_t kMostShapes = 6000;
constexpr int kLines = 480;

using Chunk = SequenceLayout::Chunk;

// Neighbouring ranks differ by the golden angle, so that they never look alike.
std::string colour(int rank) {
  const double hue = std::fmod(210.0 + 137.508 * rank, 360.0);
  return fmt::format("hsl({:.0f},62%,{}%)", hue, rank % 2 == 0 ? 55 : 66);
}

class Svg {
 public:
  void rectangle(double x, double y, double w, double h, const std::string& fill,
                 const std::string& more = "", const std::string& title = "") {
    body_ += fmt::format(
        "<rect x=\"{:.2f}\" y=\"{:.2f}\" width=\"{:.2f}\" height=\"{:.2f}\" fill=\"{}\" {}", x, y,
        std::max(w, 0.0), std::max(h, 0.0), fill, more);
    body_ += title.empty() ? "/>\n" : fmt::format("><title>{}</title></rect>\n", title);
  }
  void text(double x, double y, const std::string& text, const std::string& more = "") {
    body_ += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" {}>{}</text>\n", x, y, more, text);
  }
  void line(double x1, double y1, double x2, double y2, const std::string& stroke) {
    body_ += fmt::format(
        "<line x1=\"{:.2f}\" y1=\"{:.2f}\" x2=\"{:.2f}\" y2=\"{:.2f}\" stroke=\"{}\"/>\n", x1, y1,
        x2, y2, stroke);
  }
  void polygon(const std::vector<std::pair<double, double>>& points, const std::string& fill) {
    body_ += "<polygon points=\"";
    for (const auto& [x, y] : points) body_ += fmt::format("{:.2f},{:.2f} ", x, y);
    body_ += fmt::format("\" fill=\"{}\"/>\n", fill);
  }
  std::string finish(double height) const {
    return fmt::format(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" "
        "font-family=\"sans-serif\" font-size=\"12\" fill=\"#223\">\n"
        "<defs><pattern id=\"wait\" width=\"6\" height=\"6\" patternUnits=\"userSpaceOnUse\" "
        "patternTransform=\"rotate(45)\"><rect width=\"2\" height=\"6\" fill=\"#c33\"/></pattern>"
        "</defs>\n<rect width=\"{}\" height=\"{}\" fill=\"white\"/>\n{}</svg>\n",
        kWidth, height, kWidth, height, body_);
  }

 private:
  std::string body_;
};

// The mask on a square: keys to the right, queries downwards.
class MaskPicture {
 public:
  MaskPicture(Svg& svg, const PlanRequest& request)
      : svg_(svg),
        request_(request),
        per_query_(kMaskSide / std::max<double>(1.0, static_cast<double>(request.q_layout.seq()))),
        per_key_(kMaskSide / std::max<double>(1.0, static_cast<double>(request.kv_layout.seq()))) {}

  void draw() {
    svg_.text(kMaskLeft, kMaskTop - 42, "Which rank computes which part of the mask",
              "font-size=\"15\" font-weight=\"bold\"");
    svg_.text(
        kMaskLeft, kMaskTop - 24,
        "a colour and a number for each rank; keys, from the first to the last, and who holds "
        "them:");
    svg_.text(
        0, 0, "queries and who computes them",
        fmt::format("transform=\"translate({} {}) rotate(-90)\"", kMaskLeft - 24, kMaskTop + 180));
    svg_.rectangle(kMaskLeft, kMaskTop, kMaskSide, kMaskSide, "#f4f4f6");
    std::size_t shapes = 0;
    for (const Slice& slice : first_batch_row()) {
      shapes += request_.q_layout.overlapping(slice.q).size();
    }
    if (shapes <= kMostShapes) {
      draw_shapes();
    } else {
      draw_lines();
    }
    for (const Chunk& chunk : request_.kv_layout.chunks()) {
      svg_.rectangle(key_x(chunk.global.begin), kMaskTop - 16,
                     per_key_ * static_cast<double>(chunk.global.size()), 12, colour(chunk.rank));
    }
    for (const Chunk& chunk : request_.q_layout.chunks()) {
      svg_.rectangle(kMaskLeft - 16, query_y(chunk.global.begin), 12,
                     per_query_ * static_cast<double>(chunk.global.size()), colour(chunk.rank));
    }
    label_owners();
    svg_.rectangle(kMaskLeft, kMaskTop, kMaskSide, kMaskSide, "none", "stroke=\"#889\"");
  }

 private:
  std::span<const Slice> first_batch_row() const { return request_.mask.view().of_batch(0); }
  double key_x(std::int64_t k) const { return kMaskLeft + per_key_ * static_cast<double>(k); }
  double query_y(std::int64_t q) const { return kMaskTop + per_query_ * static_cast<double>(q); }

  // Ranks' numbers where there is room for them.
  void label_owners() {
    const std::string centred = "text-anchor=\"middle\" font-size=\"10\" fill=\"white\"";
    for (const Chunk& chunk : request_.kv_layout.chunks()) {
      const double width = per_key_ * static_cast<double>(chunk.global.size());
      if (width < 14.0) continue;
      svg_.text(key_x(chunk.global.begin) + width / 2, kMaskTop - 6.5,
                fmt::format("{}", chunk.rank), centred);
    }
    for (const Chunk& chunk : request_.q_layout.chunks()) {
      const double height = per_query_ * static_cast<double>(chunk.global.size());
      if (height < 11.0) continue;
      svg_.text(kMaskLeft - 10, query_y(chunk.global.begin) + height / 2 + 3.5,
                fmt::format("{}", chunk.rank), centred);
    }
  }

  void draw_shapes() {
    for (const Slice& slice : first_batch_row()) {
      for (const Chunk& chunk : request_.q_layout.overlapping(slice.q)) {
        const Slice part = clip(slice, chunk.global, slice.k);
        if (!part.q.empty() && !part.k.empty()) draw_shape(part, colour(chunk.rank));
      }
    }
  }

  // Both edges of a band are straight but where a side of the rectangle cuts them.
  void draw_shape(const Slice& part, const std::string& fill) {
    std::vector<std::int64_t> corners{part.q.begin, part.q.end};
    for (const std::int64_t bound : {part.band.lo, part.band.hi}) {
      if (std::abs(bound) >= kUnbounded) continue;
      for (const std::int64_t k : {part.k.begin, part.k.end}) {
        for (const std::int64_t q : {k - bound - 1, k - bound}) {
          if (part.q.contains(q)) corners.push_back(q);
        }
      }
    }
    std::sort(corners.begin(), corners.end());
    corners.erase(std::unique(corners.begin(), corners.end()), corners.end());
    std::vector<std::pair<double, double>> points;
    const auto keys = [&](std::int64_t q) { return intersect(part.k, part.band.keys_of(q)); };
    for (const std::int64_t q : corners) {
      points.emplace_back(key_x(keys(std::min(q, part.q.end - 1)).end), query_y(q));
    }
    for (auto q = corners.rbegin(); q != corners.rend(); ++q) {
      points.emplace_back(key_x(keys(std::min(*q, part.q.end - 1)).begin), query_y(*q));
    }
    svg_.polygon(points, fill);
  }

  void draw_lines() {
    std::vector<Slice> slices(first_batch_row().begin(), first_batch_row().end());
    const double height = kMaskSide / kLines;
    for (int i = 0; i < kLines; ++i) {
      const std::int64_t q = request_.q_layout.seq() * i / kLines;
      const std::string fill = colour(request_.q_layout.rank_of(q));
      for (const Slice& slice : slices) {
        if (!slice.q.contains(q)) continue;
        const Span keys = intersect(slice.k, slice.band.keys_of(q));
        svg_.rectangle(key_x(keys.begin), kMaskTop + height * i,
                       std::max(per_key_ * static_cast<double>(keys.size()), 0.6), height, fill);
      }
    }
  }

  Svg& svg_;
  const PlanRequest& request_;
  double per_query_;
  double per_key_;
};

void draw_lane_legend(Svg& svg) {
  const double y = kMaskTop - 33;
  const double x = kLanesLeft;
  svg.rectangle(x, y, 26, 11, colour(0));
  svg.text(x + 32, y + 10, "computes, in the colour of the rank whose keys it works on");
  svg.rectangle(x + 384, y + 4, 26, 4, colour(1));
  svg.text(x + 416, y + 10, "its keys arrive");
  svg.rectangle(x + 514, y, 26, 11, "url(#wait)");
  svg.text(x + 546, y + 10, "waits, or trades heads");
}

// A lane for each rank: blocks in the colour of whose keys it works on, what it waits for hatched.
void draw_lanes(Svg& svg, const Simulation& simulation) {
  svg.text(kLanesLeft, kMaskTop - 42, "Who works on whose keys, and when",
           "font-size=\"15\" font-weight=\"bold\"");
  svg.text(kLanesLeft - 10, kMaskTop - 6, "rank", "text-anchor=\"end\" font-size=\"10\"");
  draw_lane_legend(svg);
  const double lanes = static_cast<double>(std::max<std::size_t>(simulation.timelines.size(), 1));
  const double pitch = std::clamp(kMaskSide / lanes, 5.0, 60.0);
  const double scale = simulation.seconds > 0.0 ? kLanesWidth / simulation.seconds : 0.0;
  double y = kMaskTop;
  for (const RankTimeline& timeline : simulation.timelines) {
    const double height = pitch * 0.62;
    if (pitch >= 10.0) {
      svg.text(kLanesLeft - 10, y + height / 2 + 4, fmt::format("{}", timeline.rank),
               "text-anchor=\"end\"");
    }
    svg.rectangle(kLanesLeft - 7, y, 4, height, colour(timeline.rank));
    svg.rectangle(kLanesLeft, y, scale * timeline.seconds, height, "url(#wait)");
    for (const StageTime& stage : timeline.stages) {
      const double x = kLanesLeft + scale * stage.compute_begin;
      const double width = scale * (stage.compute_end - stage.compute_begin);
      svg.rectangle(x, y, width, height, colour(stage.peer),
                    "stroke=\"white\" stroke-width=\".4\"");
      if (width > 18.0 && height > 10.0) {
        const bool roomy = width > 78.0;
        const bool own = stage.peer == timeline.rank;
        const std::string keys = own ? "own keys" : fmt::format("keys of {}", stage.peer);
        svg.text(x + width / 2, y + height / 2 + 4, roomy ? keys : fmt::format("{}", stage.peer),
                 "text-anchor=\"middle\" font-size=\"11\" fill=\"white\"");
      }
      if (stage.transfer_end > stage.transfer_begin) {
        svg.rectangle(kLanesLeft + scale * stage.transfer_begin, y + height + pitch * 0.08,
                      scale * (stage.transfer_end - stage.transfer_begin), pitch * 0.14,
                      colour(stage.peer));
      }
    }
    y += pitch;
  }
  svg.line(kLanesLeft, y + 4, kLanesLeft + kLanesWidth, y + 4, "#889");
  for (int tick = 0; tick <= 4; ++tick) {
    const double x = kLanesLeft + kLanesWidth * tick / 4;
    svg.line(x, y + 4, x, y + 8, "#889");
    svg.text(x, y + 22, format_seconds(simulation.seconds * tick / 4), "text-anchor=\"middle\"");
  }
  svg.text(kLanesLeft + kLanesWidth / 8, y + 22, "time", "text-anchor=\"middle\"");
}

using Traffic = std::map<std::pair<int, int>, std::int64_t>;  // rows, from → to

Traffic traffic_of(const PlanRequest& request) {
  const auto shared = std::make_shared<const PlanRequest>(request);
  Traffic traffic;
  for (int rank = 0; rank < request.q_layout.ranks(); ++rank) {
    const AttentionPlan plan(shared, rank);
    for (const Stage& stage : plan.stages()) {
      for (const Transfer& transfer : stage.sends) {
        const int peer = transfer.peer * plan.head_ranks() + plan.head_rank();
        if (peer != rank) traffic[{rank, peer}] += transfer.rows(request.batch);
      }
    }
    for (int j = 0; j < plan.head_ranks(); ++j) {
      const int peer = plan.group() * plan.head_ranks() + j;
      if (peer != rank) traffic[{rank, peer}] += request.batch * request.kv_layout.rows(rank);
    }
  }
  return traffic;
}

void draw_matrix(Svg& svg, const PlanRequest& request) {
  const Traffic traffic = traffic_of(request);
  std::int64_t most = 1;
  for (const auto& [pair, rows] : traffic) most = std::max(most, rows);
  const int ranks = request.q_layout.ranks();
  const double cell = std::clamp(220.0 / ranks, 3.0, 24.0);
  const double top = kTrafficTop + 36;
  svg.rectangle(kMaskLeft, top, cell * ranks, cell * ranks, "#f4f4f6");
  for (const auto& [pair, rows] : traffic) {
    const double share = static_cast<double>(rows) / static_cast<double>(most);
    svg.rectangle(kMaskLeft + cell * pair.second, top + cell * pair.first, cell, cell,
                  fmt::format("hsl(225,60%,{:.0f}%)", 88.0 - 50.0 * share), "",
                  fmt::format("rank {} sends {} rows to rank {}", pair.first, rows, pair.second));
  }
  for (int rank = 0; rank < ranks; ++rank) {
    svg.rectangle(kMaskLeft - 8, top + cell * rank, 5, cell, colour(rank));
    svg.rectangle(kMaskLeft + cell * rank, top - 8, cell, 5, colour(rank));
  }
  const double x = kMaskLeft + cell * ranks + 12;
  svg.text(x, top + 12, "Keys and values that a rank (row)");
  svg.text(x, top + 28, "sends to another (column):");
  svg.rectangle(x, top + 40, 16, 16, "#f4f4f6", "stroke=\"#889\"");
  svg.text(x + 24, top + 53, "none");
  svg.rectangle(x, top + 62, 16, 16, "hsl(225,60%,38%)");
  svg.text(x + 24, top + 75, fmt::format("{} tokens, the most", traffic.empty() ? 0 : most));
  if (cell < 14.0) return;
  const std::string small = "text-anchor=\"middle\" font-size=\"9\"";
  for (int rank = 0; rank < ranks; ++rank) {
    svg.text(kMaskLeft - 15, top + cell * (rank + 0.5) + 3, fmt::format("{}", rank), small);
    svg.text(kMaskLeft + cell * (rank + 0.5), top - 12, fmt::format("{}", rank), small);
  }
}

void draw_bars(Svg& svg, const Simulation& simulation) {
  std::int64_t most = 1;
  for (const RankTimeline& t : simulation.timelines) most = std::max(most, t.bytes_sent);
  const double step =
      kLanesWidth / static_cast<double>(std::max<std::size_t>(simulation.timelines.size(), 1));
  double x = kLanesLeft;
  for (const RankTimeline& timeline : simulation.timelines) {
    const double height =
        170.0 * static_cast<double>(timeline.bytes_sent) / static_cast<double>(most);
    svg.rectangle(x, kTrafficTop + 220 - height, step * 0.8, height, colour(timeline.rank));
    if (step > 16.0) {
      svg.text(x + step * 0.4, kTrafficTop + 234, fmt::format("{}", timeline.rank),
               "text-anchor=\"middle\" font-size=\"10\"");
    }
    x += step;
  }
  svg.text(kLanesLeft, kTrafficTop + 20,
           fmt::format("Bytes that each rank sends: {} at most", format_bytes(most)));
}

}  // namespace

std::string draw_plan(const std::string& title, const PlanRequest& request,
                      const Simulation& simulation) {
  Svg svg;
  svg.text(kMaskLeft, 30, title, "font-size=\"20\" font-weight=\"bold\"");
  svg.text(kMaskLeft, 50,
           fmt::format("forward {} · {:.4g} TFLOP/s · imbalance {:.3f} · {} sent, {} of it between "
                       "nodes · {} a rank at most",
                       format_seconds(simulation.seconds),
                       simulation.seconds > 0.0 ? simulation.flops / simulation.seconds * 1e-12 : 0,
                       simulation.imbalance, format_bytes(simulation.bytes_sent),
                       format_bytes(simulation.network_bytes_sent),
                       format_bytes(simulation.peak_memory_bytes)));
  MaskPicture(svg, request).draw();
  draw_lanes(svg, simulation);
  svg.text(kMaskLeft, kTrafficTop, "What moves, and between whom",
           "font-size=\"15\" font-weight=\"bold\"");
  if (request.q_layout.ranks() <= Simulation::kTimelines) draw_matrix(svg, request);
  draw_bars(svg, simulation);
  return svg.finish(kTrafficTop + 290);
}

}  // namespace annulus::launch
