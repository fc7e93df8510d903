// What a TCP connection between two processes does when nothing else is done: the reader names some
// pieces, the other side sends them, the reader receives each where it belongs. A piece per call is the fastest here: with
// long vectors the two sides do not work at the same time.
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <sys/socket.h>

// Machines whose default is BBR pace their connections, also within the machine.
int prepare(int fd) {
  int on = 1;
  if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on)) return errno;
  return setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4) ? errno : 0;
}

static int send_all(int fd, const uint8_t *bytes, size_t count) {
  while (count > 0) {
    ssize_t sent = send(fd, bytes, count, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0) return errno;
    bytes += sent;
    count -= sent;
  }
  return 0;
}

static int receive_all(int fd, uint8_t *bytes, size_t count) {
  while (count > 0) {
    ssize_t received = recv(fd, bytes, count, MSG_WAITALL);
    if (received < 0 && errno == EINTR) continue;
    if (received < 0) return errno;
    if (received == 0) return ECONNRESET;
    bytes += received;
    count -= received;
  }
  return 0;
}

struct request { uint32_t first, count; };

// Serves requests until the reader closes: pieces at some of the offsets. These may change between requests.
int serve(int fd, const uint8_t *cache, const uint64_t *offsets, uint32_t offset_count, uint64_t piece_bytes) {
  for (;;) {
    struct request request;
    int error = receive_all(fd, (uint8_t *)&request, sizeof request);
    if (error) return error == ECONNRESET ? 0 : error;
    if (request.first > offset_count || request.count > offset_count - request.first) return EMSGSIZE;
    for (uint32_t i = 0; i < request.count; i++)
      if ((error = send_all(fd, cache + offsets[request.first + i], piece_bytes))) return error;
  }
}

int fetch(int fd, uint8_t *cache, const uint64_t *offsets, uint32_t first, uint32_t count, uint64_t piece_bytes) {
  struct request request = {first, count};
  int error = send_all(fd, (const uint8_t *)&request, sizeof request);
  for (uint32_t i = 0; !error && i < count; i++) error = receive_all(fd, cache + offsets[first + i], piece_bytes);
  return error;
}
