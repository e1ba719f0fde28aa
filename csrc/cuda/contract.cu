#include "contract_mma.cuh"

namespace shifcon {

namespace {

template <typename T>
void launch_contract(ContractArguments& p, std::int64_t tiles, void* stream) {
    const int threads = p.coefficients.padded > 64 ? 256 : 128;
    p.rank_tiles = (p.coefficients.padded + threads / 2 - 1) / (threads / 2);
    const std::int64_t blocks = tiles * p.coefficients.splits * p.rank_tiles;
    launch(contract_mma<T>, blocks, threads, contract_shared_bytes(threads), stream, p);
}

}  // namespace

void contract(Element element, ContractArguments p, std::int64_t tiles, void* stream) {
    if (element == Element::bfloat16) {
        launch_contract<BFloat16>(p, tiles, stream);
    } else if (element == Element::float16) {
        launch_contract<Float16>(p, tiles, stream);
    } else {
        contract_float32(p, tiles, stream);
    }
}

}  // namespace shifcon
