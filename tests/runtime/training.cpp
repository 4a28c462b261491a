#include "tests/runtime/training.hpp"

#include <cmath>
#include <random>

#include "kernels/buffer.hpp"
#include "runtime/operation_registry.hpp"
#include "runtime/redistribute.hpp"

namespace annulus::testing {
namespace {

/// A row-major matrix.
template <typename Real>
struct Matrix {
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::vector<Real> values;

  Matrix(std::int64_t rows_, std::int64_t columns_)
      : rows(rows_), columns(columns_), values(static_cast<std::size_t>(rows_ * columns_)) {}
  Real* row(std::int64_t i) { return values.data() + i * columns; }
  const Real* row(std::int64_t i) const { return values.data() + i * columns; }
};

/// Values that every number type rounds from the same doubles.
template <typename Real>
Matrix<Real> random_matrix(std::int64_t rows, std::int64_t columns, double spread,
                           std::uint64_t seed) {
  Matrix<Real> matrix(rows, columns);
  std::mt19937_64 random(seed);
  for (Real& value : matrix.values) {
    const double unit = static_cast<double>(random() >> 11) * 0x1p-53;
    value = static_cast<Real>((unit - 0.5) * std::sqrt(12.0) * spread);
  }
  return matrix;
}

template <typename Real>
Matrix<Real> product(const Matrix<Real>& a, const Matrix<Real>& b) {
  Matrix<Real> c(a.rows, b.columns);
  for (std::int64_t i = 0; i < a.rows; ++i) {
    for (std::int64_t j = 0; j < a.columns; ++j) {
      for (std::int64_t k = 0; k < b.columns; ++k) c.row(i)[k] += a.row(i)[j] * b.row(j)[k];
    }
  }
  return c;
}

/// aᵀ·b
template <typename Real>
Matrix<Real> transposed_product(const Matrix<Real>& a, const Matrix<Real>& b) {
  Matrix<Real> c(a.columns, b.columns);
  for (std::int64_t i = 0; i < a.rows; ++i) {
    for (std::int64_t j = 0; j < a.columns; ++j) {
      for (std::int64_t k = 0; k < b.columns; ++k) c.row(j)[k] += a.row(i)[j] * b.row(i)[k];
    }
  }
  return c;
}

/// Weights of queries, keys and values.
template <typename Real>
struct Weights {
  Matrix<Real> q, k, v;

  Weights(const TrainingProblem& p, std::uint64_t seed)
      : q(random_matrix<Real>(p.inputs, p.q_heads * p.head_dim, spread(p), seed)),
        k(random_matrix<Real>(p.inputs, p.kv_heads * p.head_dim, spread(p), seed + 1)),
        v(random_matrix<Real>(p.inputs, p.kv_heads * p.head_dim, spread(p), seed + 2)) {}

  static double spread(const TrainingProblem& p) {
    return 1.0 / std::sqrt(static_cast<double>(p.inputs));
  }
};

template <typename Real>
Matrix<Real> inputs_of(const TrainingProblem& p) {
  return random_matrix<Real>(p.rows, p.inputs, 1.0, p.seed);
}

template <typename Real>
void descend(Matrix<Real>& weights, const Matrix<Real>& gradient, double rate) {
  for (std::size_t i = 0; i < weights.values.size(); ++i) {
    weights.values[i] -= static_cast<Real>(rate) * gradient.values[i];
  }
}

// Causal attention of one query head in double, and its gradients.
class DoubleAttention {
 public:
  explicit DoubleAttention(const TrainingProblem& p) : p_(p), probability_(p.rows, p.rows) {}

  using Rows = Matrix<double>;

  void forward(std::int64_t head, const Rows& q, const Rows& k, const Rows& v, Rows& o) {
    const std::int64_t at = head * p_.head_dim;
    const std::int64_t kv = head / (p_.q_heads / p_.kv_heads) * p_.head_dim;
    for (std::int64_t i = 0; i < p_.rows; ++i) {
      double* row = probability_.row(i);
      double sum = 0.0;
      for (std::int64_t j = 0; j <= i; ++j) {
        row[j] = std::exp(scale() * dot(q.row(i) + at, k.row(j) + kv));
        sum += row[j];
      }
      for (std::int64_t j = 0; j <= i; ++j) {
        row[j] /= sum;
        for (std::int64_t d = 0; d < p_.head_dim; ++d) {
          o.row(i)[at + d] += row[j] * v.row(j)[kv + d];
        }
      }
    }
  }

  /// Of the head whose forward() came last.
  void backward(std::int64_t head, const Rows& q, const Rows& k, const Rows& v, const Rows& grad_o,
                Rows& grad_q, Rows& grad_k, Rows& grad_v) {
    const std::int64_t at = head * p_.head_dim;
    const std::int64_t kv = head / (p_.q_heads / p_.kv_heads) * p_.head_dim;
    for (std::int64_t i = 0; i < p_.rows; ++i) {
      const double* row = probability_.row(i);
      double mean = 0.0;
      for (std::int64_t j = 0; j <= i; ++j) {
        mean += row[j] * dot(grad_o.row(i) + at, v.row(j) + kv);
      }
      for (std::int64_t j = 0; j <= i; ++j) {
        const double grad_p = dot(grad_o.row(i) + at, v.row(j) + kv);
        const double grad_s = row[j] * (grad_p - mean) * scale();
        for (std::int64_t d = 0; d < p_.head_dim; ++d) {
          grad_q.row(i)[at + d] += grad_s * k.row(j)[kv + d];
          grad_k.row(j)[kv + d] += grad_s * q.row(i)[at + d];
          grad_v.row(j)[kv + d] += row[j] * grad_o.row(i)[at + d];
        }
      }
    }
  }

 private:
  double scale() const { return 1.0 / std::sqrt(static_cast<double>(p_.head_dim)); }
  double dot(const double* a, const double* b) const {
    double sum = 0.0;
    for (std::int64_t d = 0; d < p_.head_dim; ++d) sum += a[d] * b[d];
    return sum;
  }

  const TrainingProblem& p_;
  Rows probability_;
};

Matrix<double> teacher_outputs(const TrainingProblem& p) {
  const Matrix<double> x = inputs_of<double>(p);
  const Weights<double> teacher(p, p.seed + 10);
  Matrix<double> y(p.rows, p.q_heads * p.head_dim);
  DoubleAttention attention(p);
  for (std::int64_t head = 0; head < p.q_heads; ++head) {
    attention.forward(head, product(x, teacher.q), product(x, teacher.k), product(x, teacher.v), y);
  }
  return y;
}

/// This rank's rows of matrices over all rows, and of the tensors between them.
class RankRows {
 public:
  RankRows(const TensorLayout& layout, int rank) {
    for (const Span run : layout.runs(rank, 1)) {
      for (std::int64_t row = run.begin; row < run.end; ++row) rows_.push_back(row);
    }
  }
  Matrix<float> of(const Matrix<float>& whole) const {
    Matrix<float> part(static_cast<std::int64_t>(rows_.size()), whole.columns);
    for (std::size_t i = 0; i < rows_.size(); ++i) {
      std::copy_n(whole.row(rows_[i]), whole.columns, part.row(static_cast<std::int64_t>(i)));
    }
    return part;
  }

 private:
  std::vector<std::int64_t> rows_;
};

DistributedTensor as_tensor(const Matrix<float>& rows, const TensorLayout& layout, int rank,
                            DType dtype) {
  const Shape shape = layout.local_shape(rank);
  return {Tensor::copy_of(ConstTensorView(rows.values.data(), DType::f32, shape), dtype), layout,
          rank};
}

Matrix<float> as_matrix(const DistributedTensor& tensor) {
  const Shape shape = tensor.local().shape;
  Matrix<float> rows(shape[1], shape[2] * shape[3]);
  copy(tensor.local(), TensorView(rows.values.data(), DType::f32, shape));
  return rows;
}

/// Σ over ranks of Xᵀ·dY: what a projection's weights get.
Matrix<float> weight_gradient(const Matrix<float>& x, const DistributedTensor& gradient,
                              Communicator& ranks) {
  Matrix<float> sum = transposed_product(x, as_matrix(gradient));
  ranks.all_reduce_sum(sum.values);
  return sum;
}

}  // namespace

std::vector<double> train(Context& context, const TrainingProblem& p, const std::string& operation,
                          OperationConfig config) {
  config.mesh = Mesh::parse(fmt::format("sp={}", context.size()), context.size());
  const DType dtype = *config.runtime_dtype;
  const auto attention = OperationRegistry::create(operation, resolve_metadata(context, config));
  const AttentionShape shape{1, p.rows, p.rows, p.q_heads, p.kv_heads, p.head_dim, p.head_dim};
  AttentionOptions options;
  options.causal = true;
  options.deal = SequenceDeal::zigzag;
  options.output_dtype = DType::f32;
  const AttentionLayouts layouts = attention->layouts(shape, options);
  const int rank = context.rank();
  const Matrix<double> y_double = teacher_outputs(p);
  Matrix<float> y_whole(y_double.rows, y_double.columns);
  std::copy(y_double.values.begin(), y_double.values.end(), y_whole.values.begin());
  const RankRows q_rows(layouts.query, rank);
  const RankRows kv_rows(layouts.key, rank);
  const Matrix<float> x_q = q_rows.of(inputs_of<float>(p));
  const Matrix<float> x_kv = kv_rows.of(inputs_of<float>(p));
  const Matrix<float> y = q_rows.of(y_whole);
  Weights<float> weights(p, p.seed + 20);
  const auto elements = static_cast<double>(p.rows * p.q_heads * p.head_dim);

  std::vector<double> losses;
  for (int step = 0; step < p.steps; ++step) {
    const DistributedTensor q = as_tensor(product(x_q, weights.q), layouts.query, rank, dtype);
    const DistributedTensor k = as_tensor(product(x_kv, weights.k), layouts.key, rank, dtype);
    const DistributedTensor v = as_tensor(product(x_kv, weights.v), layouts.value, rank, dtype);
    const AttentionInputs inputs{q, k, v};
    const OperationOutput output = (*attention)(inputs, options);
    Matrix<float> grad_o = as_matrix(output.attention_outputs);
    float loss = 0.0F;
    for (std::size_t i = 0; i < grad_o.values.size(); ++i) {
      const float difference = grad_o.values[i] - y.values[i];
      loss += difference * difference;
      grad_o.values[i] = 2.0F * difference / static_cast<float>(elements);
    }
    context.world().all_reduce_sum({&loss, 1});
    losses.push_back(static_cast<double>(loss) / elements);
    const OperationGradients gradients = attention->backward(
        inputs, options, output, as_tensor(grad_o, output.attention_outputs.layout(), rank, dtype));
    descend(weights.q, weight_gradient(x_q, gradients.query, context.world()), p.learning_rate);
    descend(weights.k, weight_gradient(x_kv, gradients.key, context.world()), p.learning_rate);
    descend(weights.v, weight_gradient(x_kv, gradients.value, context.world()), p.learning_rate);
  }
  return losses;
}

std::vector<double> train_in_double(const TrainingProblem& p) {
  const Matrix<double> x = inputs_of<double>(p);
  const Matrix<double> y = teacher_outputs(p);
  Weights<double> weights(p, p.seed + 20);
  const auto elements = static_cast<double>(y.values.size());
  DoubleAttention attention(p);
  std::vector<double> losses;
  for (int step = 0; step < p.steps; ++step) {
    const Matrix<double> q = product(x, weights.q);
    const Matrix<double> k = product(x, weights.k);
    const Matrix<double> v = product(x, weights.v);
    Matrix<double> grad_q(q.rows, q.columns), grad_k(k.rows, k.columns), grad_v(v.rows, v.columns);
    double loss = 0.0;
    for (std::int64_t head = 0; head < p.q_heads; ++head) {
      Matrix<double> o(y.rows, y.columns);
      attention.forward(head, q, k, v, o);
      for (std::int64_t i = 0; i < p.rows; ++i) {
        for (std::int64_t d = head * p.head_dim; d < (head + 1) * p.head_dim; ++d) {
          const double difference = o.row(i)[d] - y.row(i)[d];
          loss += difference * difference;
          o.row(i)[d] = 2.0 * difference / elements;
        }
      }
      attention.backward(head, q, k, v, o, grad_q, grad_k, grad_v);
    }
    losses.push_back(loss / elements);
    descend(weights.q, transposed_product(x, grad_q), p.learning_rate);
    descend(weights.k, transposed_product(x, grad_k), p.learning_rate);
    descend(weights.v, transposed_product(x, grad_v), p.learning_rate);
  }
  return losses;
}

}  // namespace annulus::testing
