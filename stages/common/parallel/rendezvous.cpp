#include "stages/common/parallel/rendezvous.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <deque>
#include <exception>
#include <optional>
#include <thread>
#include <utility>

namespace mla {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
constexpr milliseconds kTurn{10};  // between two looks at what does not wake anybody

/// A file descriptor, closed with the object.
class Socket {
 public:
  explicit Socket(int fd = -1) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Socket() {
    if (fd_ >= 0) close(fd_);
  }
  int fd() const { return fd_; }

 private:
  int fd_;
};

/// What goes over a connection: a kind, and a text.
enum class Kind : char {
  kHello = 'h',     // to the hub: "rank ranks"
  kWelcome = 'w',   // to a rank: all have come
  kCall = 'c',      // to the hub: announce()
  kShare = 's',     // to the hub: share()
  kShared = 'a',    // to a rank: what all gave, each with its length before it
  kFail = 'f',      // either way: a code's digit and a message
  kFarewell = 'b',  // to the hub: this rank ends, and has not failed
};
struct Message {
  Kind kind = Kind::kHello;
  std::string text;
};

constexpr uint32_t kGreeting = 0x4d4c4131;  // who does not begin with it is none of ours
constexpr size_t kMostBytes = size_t{64} << 20;

std::string number(uint32_t value) {
  std::string bytes(4, '\0');
  std::memcpy(bytes.data(), &value, 4);
  return bytes;
}
uint32_t number_at(const std::string& bytes, size_t at) {
  uint32_t value = 0;
  std::memcpy(&value, bytes.data() + at, 4);
  return value;
}

std::string failure_text(const Status& status) {
  return std::string(1, static_cast<char>('0' + static_cast<int>(status.code()))) +
         status.message();
}
Status failure_of(const std::string& text) {
  const int code = text.empty() ? 0 : text[0] - '0';
  if (code <= 0 || code > static_cast<int>(StatusCode::kRankFailed)) {
    return {StatusCode::kRankFailed, "a failure that cannot be read"};
  }
  return {static_cast<StatusCode>(code), text.substr(1)};
}

/// Messages over one connection.
class Connection {
 public:
  explicit Connection(Socket socket) : socket_(std::move(socket)) {
    const int on = 1;
    setsockopt(socket_.fd(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    const timeval patience = {10, 0};  // a process that is stopped must not stop the hub
    setsockopt(socket_.fd(), SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
  }
  int fd() const { return socket_.fd(); }

  /// False if the other end is gone, or takes nothing for so long.
  bool send(Kind kind, const std::string& text) const {
    std::string bytes = number(kGreeting) + number(static_cast<uint32_t>(text.size()));
    bytes += static_cast<char>(kind);
    bytes += text;
    for (size_t sent = 0; sent < bytes.size();) {
      const ssize_t count =
          ::send(socket_.fd(), bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) return false;
      sent += static_cast<size_t>(count);
    }
    return true;
  }

  /// Reads what has come, without waiting. False if the other end is gone, or is none of ours.
  bool receive() {
    char buffer[65536];
    for (;;) {
      const ssize_t count = recv(socket_.fd(), buffer, sizeof buffer, MSG_DONTWAIT);
      if (count > 0) {
        bytes_.append(buffer, static_cast<size_t>(count));
        if (bytes_.size() > kMostBytes) return false;
        continue;
      }
      if (count < 0 && errno == EINTR) continue;
      return count < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
    }
  }

  /// The next message that is whole. `broken`: there can be none.
  std::optional<Message> next(bool* broken) {
    constexpr size_t kHead = 9;
    if (bytes_.size() < kHead) return {};
    const size_t length = number_at(bytes_, 4);
    if (number_at(bytes_, 0) != kGreeting || length > kMostBytes) {
      *broken = true;
      return {};
    }
    if (bytes_.size() < kHead + length) return {};
    Message message = {static_cast<Kind>(bytes_[8]), bytes_.substr(kHead, length)};
    bytes_.erase(0, kHead + length);
    return message;
  }

 private:
  Socket socket_;
  std::string bytes_;
};

/// "host:port", "[host]:port".
Status parse_address(const std::string& address, std::string* host, std::string* port) {
  const size_t colon = address.rfind(':');
  if (colon != std::string::npos) *host = address.substr(0, colon);
  const bool is_in_brackets = host->size() > 2 && host->front() == '[' && host->back() == ']';
  if (is_in_brackets) *host = host->substr(1, host->size() - 2);
  if (colon == std::string::npos || colon == 0 || colon + 1 == address.size() ||
      address.find_first_not_of("0123456789", colon + 1) != std::string::npos ||
      address.size() - colon > 6 || std::stoi(address.substr(colon + 1)) > 65535 ||
      (!is_in_brackets && host->find(':') != std::string::npos)) {
    return {StatusCode::kInvalidArgument, "address \"" + address +
                                              "\" must be host:port, as in 127.0.0.1:29500 or "
                                              "[::1]:29500"};
  }
  *port = address.substr(colon + 1);
  return {};
}

struct FreeAddresses {
  void operator()(addrinfo* first) const { freeaddrinfo(first); }
};
/// Where a host and a port are: a list.
using Addresses = std::unique_ptr<addrinfo, FreeAddresses>;

/// kInvalidArgument for a host that is not known, kUnavailable where it may be later.
Status resolve(const std::string& host, const std::string& port, int flags, Addresses* addresses) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags;
  const int error = getaddrinfo(host.c_str(), port.c_str(), &hints, &found);
  addresses->reset(error == 0 ? found : nullptr);
  if (error == 0) return {};
  const bool is_passing = error == EAI_AGAIN || error == EAI_SYSTEM || error == EAI_MEMORY;
  return {is_passing ? StatusCode::kUnavailable : StatusCode::kInvalidArgument,
          "host \"" + host + "\" is not known here: " + gai_strerror(error)};
}

Status listen_at(const std::string& address, Socket* result) {
  std::string host, port;
  MLA_RETURN_IF_ERROR(parse_address(address, &host, &port));
  Addresses addresses;
  MLA_RETURN_IF_ERROR(resolve(host, port, 0, &addresses));
  std::vector<const char*> places = {host.c_str()};
  if (Addresses numeric;
      host != "localhost" && !resolve(host, port, AI_NUMERICHOST, &numeric).ok()) {
    places = {"::", "0.0.0.0"};  // the first takes both families, where the host has both
  }
  int error = 0;
  for (const char* place : places) {
    MLA_RETURN_IF_ERROR(resolve(place, port, 0, &addresses));
    for (const addrinfo* at = addresses.get(); at != nullptr; at = at->ai_next) {
      Socket socket(::socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
      const int on = 1, off = 0;
      setsockopt(socket.fd(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
      if (at->ai_family == AF_INET6) {
        setsockopt(socket.fd(), IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
      }
      if (socket.fd() >= 0 && bind(socket.fd(), at->ai_addr, at->ai_addrlen) == 0 &&
          listen(socket.fd(), 1024) == 0) {
        *result = std::move(socket);
        return {};
      }
      error = errno;
    }
  }
  return {StatusCode::kUnavailable, address + ": " + std::strerror(error)};
}

/// Tries each address of the host's for its part of the time.
Status connect_to(const std::string& address, milliseconds time_limit, Socket* result) {
  std::string host, port;
  MLA_RETURN_IF_ERROR(parse_address(address, &host, &port));
  Addresses addresses;
  MLA_RETURN_IF_ERROR(resolve(host, port, 0, &addresses));
  int count = 0, error = 0;
  for (const addrinfo* at = addresses.get(); at != nullptr; at = at->ai_next) ++count;
  // Else the system waits for minutes for a host that does not answer.
  const auto each = std::max(milliseconds(1), time_limit / std::max(count, 1));
  const timeval patience = {static_cast<time_t>(each.count() / 1000),
                            static_cast<suseconds_t>(each.count() % 1000 * 1000)};
  for (const addrinfo* at = addresses.get(); at != nullptr; at = at->ai_next) {
    Socket socket(::socket(at->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
    setsockopt(socket.fd(), SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    if (socket.fd() >= 0 && connect(socket.fd(), at->ai_addr, at->ai_addrlen) == 0) {
      *result = std::move(socket);
      return {};
    }
    error = errno == EINPROGRESS ? ETIMEDOUT : errno;
  }
  return {StatusCode::kUnavailable, std::strerror(error)};
}

std::string rank_name(int64_t rank) {
  return "rank " + std::to_string(rank);
}

class HubOfThread final : public Hub {
 public:
  /// @param stop, stopped  two ends of a connection: shutting the first down ends the thread
  HubOfThread(Socket listener, Socket stop, Socket stopped, std::string address, size_t ranks,
              milliseconds time_limit)
      : listener_(std::move(listener)),
        stop_(std::move(stop)),
        stopped_(std::move(stopped)),
        address_(std::move(address)),
        time_limit_(time_limit),
        ranks_(ranks),
        thread_([this] { serve(); }) {}
  ~HubOfThread() override {
    shutdown(stop_.fd(), SHUT_RDWR);  // the other end sees it, whatever process has copies
    thread_.join();
  }
  const std::string& address() const override { return address_; }

 private:
  struct Member {
    std::optional<Connection> connection;
    std::deque<Message> said;  // calls that not all have made yet
    bool has_come = false, has_left = false;
  };

  void serve() {
    for (;;) {
      std::vector<pollfd> waits = {{stopped_.fd(), POLLIN, 0}, {listener_.fd(), POLLIN, 0}};
      for (const Connection& one : strangers_) waits.push_back({one.fd(), POLLIN, 0});
      for (const Member& member : ranks_) {
        if (member.connection) waits.push_back({member.connection->fd(), POLLIN, 0});
      }
      poll(waits.data(), waits.size(), wait_ms());
      const bool stops = waits[0].revents != 0;
      if (waits[1].revents != 0) {
        Socket socket(accept4(listener_.fd(), nullptr, nullptr, SOCK_CLOEXEC));
        if (socket.fd() >= 0) strangers_.emplace_back(std::move(socket));
      }
      hear_strangers();
      for (size_t rank = 0; rank < ranks_.size(); ++rank) hear(rank);
      while (failure_.ok() && advance()) {
      }
      // Only now: a rank that has failed may end with the hub of its process, and the others are to hear why.
      if (stops) return;
      if (failure_.ok() && deadline_ && Clock::now() >= *deadline_) fail(absent());
    }
  }

  int wait_ms() const {
    if (!deadline_ || !failure_.ok()) return -1;
    const auto left = std::chrono::ceil<milliseconds>(*deadline_ - Clock::now());
    return static_cast<int>(std::max<milliseconds::rep>(left.count(), 0));
  }

  /// Connections that have not said yet which rank they are.
  void hear_strangers() {
    for (size_t i = 0; i < strangers_.size();) {
      bool broken = !strangers_[i].receive();
      const std::optional<Message> hello = strangers_[i].next(&broken);
      if (hello && hello->kind == Kind::kHello) {
        welcome(std::move(strangers_[i]), hello->text);
      } else if (!hello && !broken) {
        ++i;
        continue;
      }
      strangers_.erase(strangers_.begin() + static_cast<std::ptrdiff_t>(i));
    }
  }

  void welcome(Connection connection, const std::string& hello) {
    int rank = -1, ranks = -1;
    if (sscanf(hello.c_str(), "%d %d", &rank, &ranks) != 2) return;
    const auto count = static_cast<int>(ranks_.size());
    Status refused;
    if (ranks != count) {
      refused = {StatusCode::kRankFailed, rank_name(rank) + " has come to a group of " +
                                              std::to_string(count) + " ranks, for one of " +
                                              std::to_string(ranks)};
    } else if (rank < 0 || rank >= count) {
      refused = {StatusCode::kRankFailed,
                 rank_name(rank) + " is none of a group of " + std::to_string(count)};
    } else if (ranks_[static_cast<size_t>(rank)].has_come) {
      refused = {StatusCode::kRankFailed, rank_name(rank) + " has come twice"};
    } else {
      refused = failure_;
    }
    if (!refused.ok()) {
      connection.send(Kind::kFail, failure_text(refused));
      return;
    }
    Member& member = ranks_[static_cast<size_t>(rank)];
    member.has_come = true;
    member.connection.emplace(std::move(connection));
    if (++here_ < ranks_.size()) {
      if (!deadline_) deadline_ = Clock::now() + time_limit_;
      return;
    }
    deadline_.reset();
    send_all(Kind::kWelcome, "");
  }

  void hear(size_t rank) {
    Member& member = ranks_[rank];
    if (!member.connection) return;
    bool broken = !member.connection->receive();
    while (const std::optional<Message> message = member.connection->next(&broken)) {
      if (message->kind == Kind::kFail) {
        fail({StatusCode::kRankFailed,
              rank_name(rank) + " failed: " + failure_of(message->text).to_string()});
      } else if (message->kind == Kind::kFarewell) {
        member.has_left = true;
      } else {
        member.said.push_back(*message);
      }
    }
    if (!broken) return;
    member.connection.reset();
    if (!member.has_left)
      fail({StatusCode::kRankFailed, rank_name(rank) + " is gone: its connection ended"});
  }

  /// Takes the next call of every rank, if all have made one.
  bool advance() {
    size_t waiting = 0;
    for (const Member& member : ranks_) waiting += member.said.empty() ? 0 : 1;
    if (waiting == 0) {
      if (here_ == ranks_.size()) deadline_.reset();
      return false;
    }
    for (size_t rank = 0; rank < ranks_.size(); ++rank) {
      if (!ranks_[rank].said.empty() || !ranks_[rank].has_left) continue;
      fail({StatusCode::kRankFailed, rank_name(rank) + " has left before " + name_of_next()});
      return false;
    }
    if (waiting < ranks_.size()) {
      if (!deadline_) deadline_ = Clock::now() + time_limit_;
      return false;
    }
    deadline_.reset();
    const Message& first = ranks_[0].said.front();
    std::string all;
    for (size_t rank = 0; rank < ranks_.size(); ++rank) {
      const Message& one = ranks_[rank].said.front();
      if (one.kind != first.kind || (one.kind == Kind::kCall && one.text != first.text)) {
        fail({StatusCode::kInvalidArgument,
              "rank 0 calls " + name_of(first) + ", " + rank_name(rank) + " " + name_of(one)});
        return false;
      }
      all += number(static_cast<uint32_t>(one.text.size())) + one.text;
    }
    if (first.kind == Kind::kShare) send_all(Kind::kShared, all);
    for (Member& member : ranks_) member.said.pop_front();
    return true;
  }

  static std::string name_of(const Message& message) {
    return message.kind == Kind::kCall ? message.text : "share";
  }
  std::string name_of_next() const {
    for (const Member& member : ranks_) {
      if (!member.said.empty()) return name_of(member.said.front());
    }
    return "the group";
  }
  Status absent() const {
    std::string names;
    for (size_t rank = 0; rank < ranks_.size(); ++rank) {
      const bool is_here =
          here_ < ranks_.size() ? ranks_[rank].has_come : !ranks_[rank].said.empty();
      if (!is_here) names += (names.empty() ? "" : ", ") + rank_name(rank);
    }
    return {StatusCode::kRankFailed, names + " did not come to " + name_of_next() + " within " +
                                         std::to_string(time_limit_.count()) + " ms"};
  }

  void fail(const Status& why) {
    if (!failure_.ok()) return;
    failure_ = why;
    send_all(Kind::kFail, failure_text(why));
  }
  void send_all(Kind kind, const std::string& text) const {
    for (const Member& member : ranks_) {
      if (member.connection) member.connection->send(kind, text);
    }
  }

  Socket listener_, stop_, stopped_;
  std::string address_;
  milliseconds time_limit_;
  // All below are the thread's.
  std::vector<Member> ranks_;
  std::vector<Connection> strangers_;
  size_t here_ = 0;
  std::optional<Clock::time_point> deadline_;  // of the call that some have made
  Status failure_;
  std::thread thread_;
};

class PlaceOfHub final : public HubPlace {
 public:
  PlaceOfHub(Socket listener, std::string address)
      : listener_(std::move(listener)), address_(std::move(address)) {}
  const std::string& address() const override { return address_; }
  Status open(int ranks, milliseconds time_limit, std::unique_ptr<Hub>* hub) override {
    if (ranks < 1) {
      return {StatusCode::kInvalidArgument,
              "ranks = " + std::to_string(ranks) + " must be at least 1"};
    }
    int ends[2] = {-1, -1};
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
      return {StatusCode::kUnavailable, address_ + ": no hub: " + std::strerror(errno)};
    }
    *hub = std::make_unique<HubOfThread>(std::move(listener_), Socket(ends[0]), Socket(ends[1]),
                                         address_, static_cast<size_t>(ranks), time_limit);
    return {};
  }

 private:
  Socket listener_;
  std::string address_;
};

class RendezvousOfRank final : public Rendezvous {
 public:
  RendezvousOfRank(Socket socket, int rank, int ranks, milliseconds time_limit)
      : connection_(std::move(socket)), rank_(rank), ranks_(ranks), time_limit_(time_limit) {}
  ~RendezvousOfRank() override {
    // Whoever leaves by an exception has failed: the hub sees that the connection ends.
    if (failure_.ok() && std::uncaught_exceptions() == 0) connection_.send(Kind::kFarewell, "");
  }
  int rank() const override { return rank_; }
  int ranks() const override { return ranks_; }
  std::string host() const override {
    sockaddr_storage own{};
    socklen_t length = sizeof own;
    char text[NI_MAXHOST] = {};
    if (getsockname(connection_.fd(), reinterpret_cast<sockaddr*>(&own), &length) != 0 ||
        getnameinfo(reinterpret_cast<sockaddr*>(&own), length, text, sizeof text, nullptr, 0,
                    NI_NUMERICHOST) != 0) {
      return "127.0.0.1";
    }
    return own.ss_family == AF_INET6 ? "[" + std::string(text) + "]" : text;
  }
  milliseconds time_limit() const override { return time_limit_; }

  Status greet(Rendezvous* above) {
    send(Kind::kHello, std::to_string(rank_) + " " + std::to_string(ranks_));
    Message welcome;
    return wait_for(Kind::kWelcome, "the group", &welcome, above);
  }
  Status announce(const std::string& call) override {
    MLA_RETURN_IF_ERROR(failure());
    send(Kind::kCall, call);
    return failure_;
  }
  Status share(const std::string& mine, std::vector<std::string>* all) override {
    MLA_RETURN_IF_ERROR(failure());
    send(Kind::kShare, mine);
    Message shared;
    MLA_RETURN_IF_ERROR(wait_for(Kind::kShared, "share", &shared));
    all->clear();
    for (size_t at = 0; at + 4 <= shared.text.size();) {
      const size_t length = number_at(shared.text, at);
      all->push_back(shared.text.substr(at + 4, length));
      at += 4 + length;
    }
    return {};
  }
  void fail(const Status& why) override {
    if (!failure().ok()) return;
    send(Kind::kFail, failure_text(why));
    if (!failure_.ok()) return;
    failure_ = {StatusCode::kRankFailed, rank_name(rank_) + " failed: " + why.to_string()};
  }
  Status failure() override {
    if (failure_.ok()) hear();
    return failure_;
  }

 private:
  void send(Kind kind, const std::string& text) {
    if (!failure_.ok() || connection_.send(kind, text)) return;
    hear();  // it may have said why
    if (failure_.ok()) lost();
  }
  void lost() { failure_ = {StatusCode::kRankFailed, "the connection to the ranks' hub ended"}; }
  void hear() {
    bool broken = !connection_.receive();
    while (const std::optional<Message> message = connection_.next(&broken)) {
      if (message->kind != Kind::kFail) {
        heard_.push_back(*message);
      } else if (failure_.ok()) {
        failure_ = failure_of(message->text);
      }
    }
    if (broken && failure_.ok()) lost();
  }
  /// The hub keeps the time limit; where that is gone, too, this end does, a little later.
  Status wait_for(Kind kind, const std::string& what, Message* message,
                  Rendezvous* above = nullptr) {
    const auto deadline = Clock::now() + time_limit_ + time_limit_ / 2;
    for (;;) {
      const Status failed = failure();
      while (!heard_.empty()) {  // what came before a failure counts
        *message = std::move(heard_.front());
        heard_.pop_front();
        if (message->kind == kind) return {};
      }
      MLA_RETURN_IF_ERROR(failed);
      if (above != nullptr) MLA_RETURN_IF_ERROR(above->failure());
      const auto left = std::chrono::ceil<milliseconds>(deadline - Clock::now()).count();
      if (left <= 0) {
        failure_ = {StatusCode::kRankFailed, "the ranks' hub did not answer " + what};
        return failure_;
      }
      pollfd wait = {connection_.fd(), POLLIN, 0};
      poll(&wait, 1, static_cast<int>(above == nullptr ? left : std::min(left, kTurn.count())));
    }
  }

  Connection connection_;
  const int rank_, ranks_;
  const milliseconds time_limit_;
  std::deque<Message> heard_;
  Status failure_;
};

}  // namespace

Status take_hub_place(const std::string& address, std::unique_ptr<HubPlace>* place) {
  Socket listener;
  MLA_RETURN_IF_ERROR(listen_at(address, &listener));
  sockaddr_storage bound{};
  socklen_t length = sizeof bound;
  char port[NI_MAXSERV] = {};
  if (getsockname(listener.fd(), reinterpret_cast<sockaddr*>(&bound), &length) != 0 ||
      getnameinfo(reinterpret_cast<sockaddr*>(&bound), length, nullptr, 0, port, sizeof port,
                  NI_NUMERICSERV) != 0) {
    return {StatusCode::kUnavailable, address + ": " + std::strerror(errno)};
  }
  *place = std::make_unique<PlaceOfHub>(std::move(listener),
                                        address.substr(0, address.rfind(':') + 1) + port);
  return {};
}

Status open_hub(const std::string& address, int ranks, milliseconds time_limit,
                std::unique_ptr<Hub>* hub) {
  std::unique_ptr<HubPlace> place;
  MLA_RETURN_IF_ERROR(take_hub_place(address, &place));
  return place->open(ranks, time_limit, hub);
}

Status join_hub(const std::string& address, int rank, int ranks, milliseconds time_limit,
                std::unique_ptr<Rendezvous>* rendezvous, Rendezvous* above) {
  if (rank < 0 || rank >= ranks) {
    return {StatusCode::kInvalidArgument, "rank = " + std::to_string(rank) +
                                              " must be in [0, ranks = " + std::to_string(ranks) +
                                              ")"};
  }
  const auto deadline = Clock::now() + time_limit;
  Socket socket;
  for (;;) {  // the hub may come later
    const auto left = std::chrono::ceil<milliseconds>(deadline - Clock::now());
    const Status connected = connect_to(address, left, &socket);
    if (connected.ok()) break;
    if (connected.code() == StatusCode::kInvalidArgument) return connected;
    if (above != nullptr) MLA_RETURN_IF_ERROR(above->failure());
    if (Clock::now() >= deadline) {
      return {StatusCode::kUnavailable, "no hub at " + address + " within " +
                                            std::to_string(time_limit.count()) +
                                            " ms: " + connected.message()};
    }
    std::this_thread::sleep_for(kTurn);
  }
  auto joined = std::make_unique<RendezvousOfRank>(std::move(socket), rank, ranks, time_limit);
  MLA_RETURN_IF_ERROR(joined->greet(above));
  *rendezvous = std::move(joined);
  return {};
}

}  // namespace mla
