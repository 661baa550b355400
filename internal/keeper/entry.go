package keeper

import (
	"errors"
	"fmt"
	"unicode/utf8"
)

// EnvFD names the environment variable with the number of the descriptor on
// which a supervisor started by the keeper finds its channel. Pass the descriptor
// to [Attach] and remove the variable from the environment of further children.
const EnvFD = "KTLSVISOR_KEEPER_FD"

// Limits of one entry.
const (
	MaxName = 255      // bytes of Key.Name
	MaxMeta = 16 << 10 // bytes of Entry.Meta; larger data goes into a sealed memfd
	MaxFDs  = 253      // descriptors of one entry: as many as fit into one message
)

// Kind says what an entry is for. The keeper only knows KindOutput.
type Kind uint8

// Kinds. Their numbers are on the wire between versions: never renumber.
const (
	KindBlob     Kind = iota + 1 // data only, or data in a sealed memfd
	KindLedger                   // the ledger's memory
	KindListener                 // a listening socket
	KindWorker                   // a worker's control channel and pidfd
	KindSocket                   // a session's retained socket
	// KindOutput is the read end of a worker's stdout or stderr (first
	// descriptor). While no supervisor leads, the keeper reads it and writes the
	// lines, with Key.Name before each, to Config.Output.
	KindOutput
	KindArena  // a worker's arena: memory for the journals of its sessions
	KindTicket // session-ticket keys, in a memfd
	KindGroup  // the checkpoint of a group's state, in a sealed memfd
)

func (k Kind) String() string {
	switch k {
	case KindBlob:
		return "blob"
	case KindLedger:
		return "ledger"
	case KindListener:
		return "listener"
	case KindWorker:
		return "worker"
	case KindSocket:
		return "socket"
	case KindOutput:
		return "output"
	case KindArena:
		return "arena"
	case KindTicket:
		return "ticket"
	case KindGroup:
		return "group"
	default:
		return fmt.Sprintf("kind %d", uint8(k))
	}
}

// Key names an entry.
type Key struct {
	Kind Kind
	ID   uint64
	Name string
}

func (k Key) String() string {
	if k.Name == "" {
		return fmt.Sprintf("%s %d", k.Kind, k.ID)
	}
	return fmt.Sprintf("%s %d %q", k.Kind, k.ID, k.Name)
}

// Entry is what the keeper stores under a key. Each call says who owns FDs.
type Entry struct {
	Key  Key
	Meta []byte
	FDs  []int
}

func (e *Entry) validate() error {
	switch {
	case len(e.Key.Name) > MaxName:
		return fmt.Errorf("entry %s %d: name of %d bytes, the limit is %d", e.Key.Kind, e.Key.ID, len(e.Key.Name), MaxName)
	case !utf8.ValidString(e.Key.Name):
		return fmt.Errorf("entry %s: the name is not UTF-8", e.Key)
	case len(e.Meta) > MaxMeta:
		return fmt.Errorf("entry %s: %d bytes of data, the limit is %d; put more into a sealed memfd", e.Key, len(e.Meta), MaxMeta)
	case len(e.FDs) > MaxFDs:
		return fmt.Errorf("entry %s: %d descriptors, the limit is %d", e.Key, len(e.FDs), MaxFDs)
	}
	for _, fd := range e.FDs {
		if fd < 0 {
			return fmt.Errorf("entry %s: %d is not a descriptor", e.Key, fd)
		}
	}
	return nil
}

// Errors that a Client returns, possibly wrapped.
var (
	// ErrNotLeader: only the leader may change what the keeper holds. A
	// supervisor that gets it is stale and should end.
	ErrNotLeader = errors.New("this process does not lead (keeper)")
	// ErrLed: another process leads.
	ErrLed = errors.New("another supervisor leads (keeper)")
	// ErrFull: the keeper is out of descriptors or space. Nothing it held was lost.
	ErrFull = errors.New("the keeper is full; raise its NOFILE limit (LimitNOFILE= under systemd)")
	// ErrEnding: the whole unit is ending.
	ErrEnding = errors.New("the keeper is ending")
	// ErrClosed: the keeper is gone, closed the channel, or Close was called.
	ErrClosed = errors.New("the channel to the keeper is closed")
)
