// A CPU in the place of csrc/cuda/gpu.cuh: the kernels' own sources run on it, thread by thread, for tests.
//
// A block's threads are coroutines that take turns in a random order (SHIFCON_EMULATED_SEED) and give way only at
// barriers and warp instructions. Warp instructions wait for all 32 lanes and do what the PTX ISA says, from its tables
// of fragments (9.7.14.5). An asynchronous copy happens as late as its wait allows. Shared memory starts as NaN and
// ends at a page that must not be touched. So a missing barrier or wait, a lane that goes astray, an index that runs
// out, or a fragment in the wrong order changes numbers or ends the process; timing, caches and bank conflicts are
// not there to be seen. The results are those of one block after another.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "elements.cuh"

#define SHIFCON_KERNEL(...) void
#define SHIFCON_DEVICE inline
#define SHIFCON_KEY CPU

namespace shifcon {

namespace emulated {

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulated GPU: %s\n", what);
    std::abort();
}

inline int from_environment(const char* name, int otherwise) {
    const char* const text = std::getenv(name);
    return text == nullptr ? otherwise : std::atoi(text);
}

struct Copy {
    void* to;
    const void* from;
    bool present;
};

struct Thread {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 17);
    std::vector<Copy> issued;
    std::deque<std::vector<Copy>> groups;
    bool done = false;
};

struct Warp {
    int arrived = 0;
    long generation = 0;
    const char* instruction = nullptr;
    void* lanes[32];
};

struct Machine {
    std::vector<std::unique_ptr<Thread>> threads;
    std::vector<Warp> warps;
    std::function<void()> body;
    ucontext_t scheduler;
    int current = 0, count = 0, alive = 0, arrived = 0;
    long generation = 0, progress = 0;
    unsigned block = 0;
    unsigned char* shared = nullptr;
    std::mt19937 random{static_cast<unsigned>(from_environment("SHIFCON_EMULATED_SEED", 1))};
};

inline Machine machine;

inline void give_way() { swapcontext(&machine.threads[machine.current]->context, &machine.scheduler); }

inline void run_thread() {
    machine.body();
    Thread& self = *machine.threads[machine.current];
    if (!self.issued.empty() || !self.groups.empty()) {
        for (const auto& group : self.groups) {
            if (!group.empty()) {
                fail("a thread ended with copies under way");
            }
        }
        if (!self.issued.empty()) {
            fail("a thread ended with copies that it did not commit");
        }
    }
    self.done = true;
    --machine.alive;
    ++machine.progress;
    if (machine.arrived > 0 && machine.arrived == machine.alive) {
        fail("some threads wait at a barrier that others left");
    }
}

inline void run_block(int threads) {
    Machine& m = machine;
    while (static_cast<int>(m.threads.size()) < threads) {
        m.threads.push_back(std::make_unique<Thread>());
    }
    m.warps.assign((threads + 31) / 32, Warp{});
    m.count = m.alive = threads;
    m.arrived = 0;
    std::vector<int> order(threads);
    for (int index = 0; index < threads; ++index) {
        Thread& thread = *m.threads[index];
        thread.done = false;
        thread.issued.clear();
        thread.groups.clear();
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = &m.scheduler;
        makecontext(&thread.context, run_thread, 0);
        order[index] = index;
    }
    std::shuffle(order.begin(), order.end(), m.random);
    while (m.alive > 0) {
        const long before = m.progress;
        std::rotate(order.begin(), order.begin() + 1 + static_cast<int>(m.random() % threads) % threads, order.end());
        for (const int index : order) {
            if (!m.threads[index]->done) {
                m.current = index;
                swapcontext(&m.scheduler, &m.threads[index]->context);
            }
        }
        if (m.progress == before) {
            fail("every thread waits");
        }
    }
}

// All lanes come together; the last one to come does the work of all.
template <typename Work>
void collective(const char* instruction, void* mine, Work work) {
    Warp& warp = machine.warps[machine.current / 32];
    if (warp.arrived == 0) {
        warp.instruction = instruction;
    } else if (warp.instruction != instruction) {
        fail("the lanes of a warp are at different instructions");
    }
    warp.lanes[machine.current % 32] = mine;
    const long generation = warp.generation;
    if (++warp.arrived == 32) {
        work(warp.lanes);
        warp.arrived = 0;
        ++warp.generation;
        ++machine.progress;
    }
    while (warp.generation == generation) {
        give_way();
    }
}

inline float half_to_float(std::uint16_t bits) {
    return static_cast<float>(c10::Half(bits, c10::Half::from_bits()));
}

template <typename T>
float decode(std::uint32_t pair, int which) {
    const auto bits = static_cast<std::uint16_t>(pair >> (16 * which));
    if constexpr (is_float16<T>) {
        return half_to_float(bits);
    } else {
        const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }
}

inline void load_matrices(const char* name, std::uint32_t (&result)[4], const void* row, bool transposed) {
    struct Lane {
        std::uint32_t* result;
        const unsigned char* row;
    } mine{result, static_cast<const unsigned char*>(row)};
    if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) {
        fail("ldmatrix of a row that is not aligned");
    }
    collective(name, &mine, [transposed](void** lanes) {
        const auto element = [&](int matrix, int r, int c) {
            std::uint16_t bits;
            std::memcpy(&bits, static_cast<Lane*>(lanes[matrix * 8 + r])->row + 2 * c, 2);
            return static_cast<std::uint32_t>(bits);
        };
        for (int lane = 0; lane < 32; ++lane) {
            for (int matrix = 0; matrix < 4; ++matrix) {
                const int g = lane / 4, q = lane % 4 * 2;
                static_cast<Lane*>(lanes[lane])->result[matrix] =
                    transposed ? element(matrix, q, g) | element(matrix, q + 1, g) << 16
                               : element(matrix, g, q) | element(matrix, g, q + 1) << 16;
            }
        }
    });
}

}  // namespace emulated

inline unsigned block_index() { return emulated::machine.block; }
inline int block_threads() { return emulated::machine.count; }
inline int thread_index() { return emulated::machine.current; }
inline int lane_index() { return emulated::machine.current % 32; }
inline int warp_index() { return emulated::machine.current / 32; }
inline unsigned char* shared_memory() { return emulated::machine.shared; }

inline void block_barrier() {
    auto& m = emulated::machine;
    const long generation = m.generation;
    if (++m.arrived == m.count) {
        m.arrived = 0;
        ++m.generation;
        ++m.progress;
    }
    while (m.generation == generation) {
        emulated::give_way();
    }
}

inline void warp_barrier() {
    emulated::collective("bar.warp.sync", nullptr, [](void**) {});
}

inline unsigned lanes_with(int value) {
    struct Lane {
        int value;
        unsigned result;
    } mine{value, 0};
    emulated::collective("match.any.sync", &mine, [](void** lanes) {
        for (int lane = 0; lane < 32; ++lane) {
            for (int other = 0; other < 32; ++other) {
                const bool same = static_cast<Lane*>(lanes[lane])->value == static_cast<Lane*>(lanes[other])->value;
                static_cast<Lane*>(lanes[lane])->result |= same ? 1u << other : 0u;
            }
        }
    });
    return mine.result;
}

inline int count_bits(unsigned bits) { return __builtin_popcount(bits); }

inline int shuffle_up(int value, int distance) {
    struct Lane {
        int value, distance, result;
    } mine{value, distance, value};
    emulated::collective("shfl.sync.up", &mine, [](void** lanes) {
        for (int lane = 0; lane < 32; ++lane) {
            Lane& own = *static_cast<Lane*>(lanes[lane]);
            own.result = lane >= own.distance ? static_cast<Lane*>(lanes[lane - own.distance])->value : own.value;
        }
    });
    return mine.result;
}

inline float shuffle_xor(float value, int mask) {
    struct Lane {
        float value;
        int mask;
        float result;
    } mine{value, mask, 0.0f};
    emulated::collective("shfl.sync.bfly", &mine, [](void** lanes) {
        for (int lane = 0; lane < 32; ++lane) {
            Lane& own = *static_cast<Lane*>(lanes[lane]);
            own.result = static_cast<Lane*>(lanes[lane ^ own.mask])->value;
        }
    });
    return mine.result;
}

inline void copy_async(void* shared, const void* global, bool present) {
    if ((reinterpret_cast<std::uintptr_t>(shared) | reinterpret_cast<std::uintptr_t>(global)) % 16 != 0) {
        emulated::fail("cp.async between addresses that are not aligned");
    }
    emulated::machine.threads[emulated::machine.current]->issued.push_back({shared, global, present});
}

inline void copy_commit() {
    auto& self = *emulated::machine.threads[emulated::machine.current];
    self.groups.push_back(std::move(self.issued));
    self.issued.clear();
}

template <int groups>
void copy_wait() {
    auto& self = *emulated::machine.threads[emulated::machine.current];
    while (static_cast<int>(self.groups.size()) > groups) {
        for (const auto& copy : self.groups.front()) {
            if (copy.present) {
                std::memcpy(copy.to, copy.from, 16);
            } else {
                std::memset(copy.to, 0, 16);
            }
        }
        self.groups.pop_front();
    }
}

inline void load_matrices(std::uint32_t (&result)[4], const void* row) {
    emulated::load_matrices("ldmatrix", result, row, false);
}
inline void load_matrices_transposed(std::uint32_t (&result)[4], const void* row) {
    emulated::load_matrices("ldmatrix.trans", result, row, true);
}

template <typename T>
void multiply_add(float (&sum)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
    struct Lane {
        float* sum;
        const std::uint32_t* a;
        std::uint32_t b[2];
    } mine{sum, a, {b0, b1}};
    emulated::collective("mma", &mine, [](void** lanes) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            const Lane& own = *static_cast<Lane*>(lanes[lane]);
            const int g = lane / 4, q = lane % 4 * 2;
            for (int i = 0; i < 8; ++i) {  // a_i: row g or g + 8, column 2 (lane % 4) + (i & 1), + 8 from a_4 on
                const int row = i % 4 < 2 ? g : g + 8, column = q + i % 2 + (i >= 4 ? 8 : 0);
                left[row][column] = emulated::decode<T>(own.a[i / 2], i % 2);
            }
            for (int i = 0; i < 4; ++i) {  // b_i: row 2 (lane % 4) + (i & 1), + 8 from b_2 on; column g
                right[q + i % 2 + (i >= 2 ? 8 : 0)][g] = emulated::decode<T>(own.b[i / 2], i % 2);
            }
        }
        for (int lane = 0; lane < 32; ++lane) {
            const Lane& own = *static_cast<Lane*>(lanes[lane]);
            for (int i = 0; i < 4; ++i) {  // c_i: row g or g + 8, column 2 (lane % 4) + (i & 1)
                const int row = i < 2 ? lane / 4 : lane / 4 + 8, column = lane % 4 * 2 + i % 2;
                double total = own.sum[i];
                for (int inner = 0; inner < 16; ++inner) {
                    total += static_cast<double>(left[row][inner]) * right[inner][column];
                }
                own.sum[i] = static_cast<float>(total);
            }
        }
    });
}

inline float widen(float value) { return value; }
inline float widen(BFloat16 value) { return emulated::decode<BFloat16>(value.bits, 0); }
inline float widen(Float16 value) { return emulated::decode<Float16>(value.bits, 0); }

template <typename T>
std::uint32_t pack(float first, float second) {
    if constexpr (is_float16<T>) {
        return c10::Half(first).x | static_cast<std::uint32_t>(c10::Half(second).x) << 16;
    } else {
        return c10::BFloat16(first).x | static_cast<std::uint32_t>(c10::BFloat16(second).x) << 16;
    }
}

template <typename Arguments>
void launch(void (*kernel)(Arguments), std::int64_t blocks, int threads, int shared_bytes, void*,
            const Arguments& arguments) {
    constexpr std::size_t kPage = 4096;
    if (shared_bytes > 99 * 1024 || threads > 1024 || threads % 32 != 0 || blocks > 0x7fffffff) {
        emulated::fail("a launch that not every GPU takes");
    }
    const std::size_t pages = (shared_bytes + kPage - 1) / kPage * kPage;
    void* const memory = mmap(nullptr, pages + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(static_cast<char*>(memory) + pages, kPage, PROT_NONE) != 0) {
        emulated::fail("no memory");
    }
    emulated::machine.shared = static_cast<unsigned char*>(memory) + (pages - (shared_bytes + 15) / 16 * 16);
    for (std::int64_t block = 0; block < blocks; ++block) {
        std::memset(memory, 0xff, pages);
        emulated::machine.block = static_cast<unsigned>(block);
        emulated::machine.body = [kernel, arguments] { kernel(arguments); };
        emulated::run_block(threads);
    }
    munmap(memory, pages + kPage);
}

inline int multiprocessors(int) { return emulated::from_environment("SHIFCON_EMULATED_PROCESSORS", 4); }

struct Device {
    explicit Device(const torch::stable::Tensor&) {}
    void* stream = nullptr;
};

}  // namespace shifcon
