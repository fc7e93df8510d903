// Copies scattered pieces of memory in one launch. A call of the driver for each costs 3 to 6 us, whatever its length.
//
// A thread block copies a whole piece, then the one that lies as many entries further on as there are blocks. The entry
// after is looked up meanwhile, because the list may lie in memory of the host, behind a bus.
//
// Changed? `make kernels` writes copy_pieces.ptx, which is what the library has in it.

struct Piece {
    unsigned long long from;
    unsigned long long to;
    unsigned long long len_bytes;
};

// So many loads of a thread are on their way at once.
enum { AT_ONCE = 4 };

template <typename Unit>
static __device__ __forceinline__ void copy(unsigned long long from, unsigned long long to, unsigned long long count) {
    const Unit *source = reinterpret_cast<const Unit *>(from);
    Unit *target = reinterpret_cast<Unit *>(to);
    const unsigned long long step = blockDim.x;
    unsigned long long at = threadIdx.x;
    for (; at + (AT_ONCE - 1) * step < count; at += AT_ONCE * step) {
        Unit units[AT_ONCE];
#pragma unroll
        for (int number = 0; number < AT_ONCE; number++) units[number] = source[at + number * step];
#pragma unroll
        for (int number = 0; number < AT_ONCE; number++) target[at + number * step] = units[number];
    }
    for (; at < count; at += step) target[at] = source[at];
}

// Whole units of 16 bytes where both places allow it; else, and at the end, byte by byte.
static __device__ __forceinline__ void copy(const Piece &piece) {
    const unsigned long long unit_bytes = sizeof(uint4);
    const bool is_aligned = (piece.from | piece.to) % unit_bytes == 0;
    const unsigned long long units = is_aligned ? piece.len_bytes / unit_bytes : 0;
    copy<uint4>(piece.from, piece.to, units);
    const unsigned long long done = units * unit_bytes;
    copy<unsigned char>(piece.from + done, piece.to + done, piece.len_bytes - done);
}

extern "C" __global__ void kvlane_copy_pieces(const Piece *pieces, unsigned int count) {
    unsigned int number = blockIdx.x;
    if (number >= count) return;
    Piece piece = pieces[number];
    while (true) {
        const unsigned int next = number + gridDim.x;
        Piece following = piece;
        if (next < count) following = pieces[next];
        copy(piece);
        if (next >= count) return;
        piece = following;
        number = next;
    }
}
