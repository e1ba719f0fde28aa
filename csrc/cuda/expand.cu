#include "expand_mma.cuh"

namespace shifcon {

namespace {

template <typename T>
void launch_expand(const ExpandArguments& p, std::int64_t tiles, void* stream) {
    const std::int64_t blocks = tiles * p.column_blocks;
    if (p.coefficients.padded <= 64) {
        launch(expand_mma<T, 4>, blocks, 128, expand_shared_bytes<4>(p.coefficients.padded), stream, p);
    } else {
        launch(expand_mma<T, 8>, blocks, 128, expand_shared_bytes<8>(p.coefficients.padded), stream, p);
    }
}

}  // namespace

void expand(Element element, ExpandArguments p, std::int64_t tiles, void* stream) {
    if (element == Element::float32) {
        expand_float32(p, tiles, stream);
        return;
    }
    // Long enough to read the coefficients seldom, short enough to give every multiprocessor several blocks.
    p.block_columns = tiles >= 64 ? 512 : 128;
    p.column_blocks = (p.hidden + p.block_columns - 1) / p.block_columns;
    if (element == Element::bfloat16) {
        launch_expand<BFloat16>(p, tiles, stream);
    } else {
        launch_expand<Float16>(p, tiles, stream);
    }
}

}  // namespace shifcon
