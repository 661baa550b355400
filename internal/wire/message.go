// Package wire is the control channel between a supervisor and a worker: its
// messages, their limits and their encoding. handoff/PROTOCOL.md describes it for
// people who write a worker in another language.
//
// A move, per session; every message carries (id, epoch):
//
//	supervisor                old worker                 new worker
//	   | ---- FREEZE ------------> |                          |
//	   | <--- PARKED ------------- | (keeps its copy)         |
//	   | ---- ADOPT + socket -------------------------------> |
//	   | <--- ADOPTED / REFUSED ----------------------------- |
//	   |  commit in the ledger                                |
//	   | ---- RESUME ---------------------------------------> |
//	   | ---- RELEASE -----------> |                          |
//
// Anything that fails before the commit ends in THAW to the old worker and ABORT
// to the new one.
package wire

// Version is the protocol version this package speaks.
const Version = 1

// EnvFD names the environment variable that tells a worker which descriptor is
// its control channel.
const EnvFD = "KTLSVISOR_FD"

// ChannelFD is the descriptor of the control channel in a worker.
const ChannelFD = 3

// Limits of the protocol. A message that breaks one closes the channel.
const (
	MaxItems           = 64       // sessions in one message
	MaxInline          = 4 << 10  // bytes of a cargo or blob carried in the message itself
	MaxCargo           = 16 << 20 // bytes of a cargo or blob carried in a sealed memfd
	MaxLarge           = 64 << 20 // bytes of all memfds of one message
	MaxGroup           = 64       // bytes of a group's name
	MaxText            = 512      // bytes of a text for people
	MaxSchemas         = 64       // schemas in a HELLO
	MaxHandshakeRecord = 64       // bytes of the record in SEND
	MaxArena           = 64 << 30 // bytes of a worker's arena, of which it uses what it needs
)

// Type says what a message is.
type Type uint8

// The messages. W>S is from worker to supervisor, S>W the reverse.
const (
	TypeHello          Type = 1  // W>S: first message
	TypeWelcome        Type = 2  // S>W: answer to HELLO
	TypeReady          Type = 3  // W>S: takes sessions from now on
	TypeAdopt          Type = 4  // S>W: take these sessions, do not touch them yet
	TypeAdopted        Type = 5  // W>S: can serve these
	TypeRefused        Type = 6  // W>S: cannot serve these
	TypeFreeze         Type = 7  // S>W: bring these to a safe point
	TypeParked         Type = 8  // W>S: these are at a safe point, here is their state
	TypeThaw           Type = 9  // S>W: go on with these
	TypeResume         Type = 10 // S>W: adopted sessions are yours, serve them
	TypeRelease        Type = 11 // S>W: parked sessions are no longer yours, close your copy
	TypeAbort          Type = 12 // S>W: adopted sessions will not be yours, close your copy
	TypeClosed         Type = 13 // W>S: these sessions ended
	TypeClosedAck      Type = 14 // S>W: their end is recorded, forget them
	TypeClose          Type = 15 // S>W: end these sessions
	TypeInventory      Type = 16 // S>W: a new supervisor asks what you have
	TypeInventoryReply Type = 17 // W>S: the answer, in parts
	TypeGroup          Type = 18 // W>S: this session joins (or leaves) a group
	TypeGrouped        Type = 19 // S>W: the group lives with you, go on
	TypeStop           Type = 20 // S>W: retire
	TypePing           Type = 21 // S>W: answer with PONG
	TypePong           Type = 22 // W>S

	// A change of keys in the kernel layer; see Rekey.
	TypeKeyUpdate  Type = 23 // W>S: the peer's KeyUpdate was read; nothing more is
	TypeRekeyed    Type = 24 // S>W: its next key is set, read on
	TypeWantUpdate Type = 25 // W>S: a KeyUpdate should be sent
	TypePause      Type = 26 // S>W: stop writing, at a record's end
	TypePaused     Type = 27 // W>S: nothing is written until CONTINUE
	TypeSend       Type = 28 // S>W: send this handshake record
	TypeSent       Type = 29 // W>S: it was sent, or could not be
	TypeContinue   Type = 30 // S>W: the next key is set, write on
	TypeUpdate     Type = 31 // S>W: software layer: send a KeyUpdate yourself; the answer is SENT

	TypeCheckpoint   Type = 35 // W>S: the state of a group, for whoever has it after a crash
	TypeCheckpointed Type = 36 // S>W: it is kept, or why not

	TypeMarks Type = 32 // S>W: memory for saying which sessions are being handled; see marks.go

	// Between two processes of a program that is its own supervisor (handoff.Upgrader).
	TypeBegin   Type = 41 // S>W: the old process accepts no more: accept
	TypeSettled Type = 42 // S>W: what could be moved has been: take over
	TypeKeys    Type = 43 // S>W: traffic secrets of sessions in the kernel layer, before their ADOPT
)

var typeNames = map[Type]string{
	TypeHello: "HELLO", TypeWelcome: "WELCOME", TypeReady: "READY", TypeAdopt: "ADOPT",
	TypeAdopted: "ADOPTED", TypeRefused: "REFUSED", TypeFreeze: "FREEZE", TypeParked: "PARKED",
	TypeThaw: "THAW", TypeResume: "RESUME", TypeRelease: "RELEASE", TypeAbort: "ABORT",
	TypeClosed: "CLOSED", TypeClosedAck: "CLOSED_ACK", TypeClose: "CLOSE",
	TypeInventory: "INVENTORY", TypeInventoryReply: "INVENTORY_REPLY", TypeGroup: "GROUP",
	TypeGrouped: "GROUPED", TypeStop: "STOP", TypePing: "PING", TypePong: "PONG",
	TypeKeyUpdate: "KEY_UPDATE", TypeRekeyed: "REKEYED", TypeWantUpdate: "WANT_UPDATE",
	TypePause: "PAUSE", TypePaused: "PAUSED", TypeSend: "SEND", TypeSent: "SENT",
	TypeBegin: "BEGIN", TypeSettled: "SETTLED", TypeKeys: "KEYS",
	TypeContinue: "CONTINUE", TypeUpdate: "UPDATE", TypeMarks: "MARKS", TypeCheckpoint: "CHECKPOINT", TypeCheckpointed: "CHECKPOINTED",
}

func (t Type) String() string {
	if s, ok := typeNames[t]; ok {
		return s
	}
	return "unknown"
}

// Epoch numbers one attempt to move one session: the supervisor's incarnation in
// the upper 32 bits, a counter in the lower. It only rises.
type Epoch uint64

// NewEpoch composes an epoch.
func NewEpoch(incarnation, counter uint32) Epoch {
	return Epoch(uint64(incarnation)<<32 | uint64(counter))
}

// Ref names a session and the attempt that a message is about.
type Ref struct {
	ID    uint64 `cbor:"1,keyasint"`
	Epoch Epoch  `cbor:"2,keyasint"`
}

// Cargo is what travels with a session besides its socket.
type Cargo struct {
	Facts  []byte `cbor:"1,keyasint,omitempty"` // ktls facts; from the supervisor only
	Record []byte `cbor:"2,keyasint,omitempty"` // ktls record state
	App    []byte `cbor:"3,keyasint,omitempty"` // the application's state
}

// Size is the number of payload bytes.
func (c *Cargo) Size() int { return len(c.Facts) + len(c.Record) + len(c.App) }

// Flags say how a session comes to its new owner.
type Flags uint8

const (
	// FlagRestored marks a session that had an owner before.
	FlagRestored Flags = 1
	// FlagInterrupted marks a session whose owner died: what the application had
	// read and not answered is gone, and so is its state.
	FlagInterrupted Flags = 2
	// FlagResting marks a session at rest, in PARKED and the ADOPT that follows: its
	// handler has nothing to do before there is input.
	FlagResting Flags = 4
)

// Item is one session in ADOPT and PARKED. A cargo larger than MaxInline travels
// in a sealed memfd, among the message's descriptors: Large is set, Cargo empty.
type Item struct {
	Ref
	Cargo Cargo  `cbor:"3,keyasint,omitempty"`
	Group string `cbor:"4,keyasint,omitempty"`
	Flags Flags  `cbor:"5,keyasint,omitempty"`
	Large bool   `cbor:"6,keyasint,omitempty"`
	// WithSocket: in PARKED too a descriptor is the session's socket, because nobody else
	// has one (Welcome.Keeper).
	WithSocket bool `cbor:"7,keyasint,omitempty"`

	// Socket is the session's descriptor in ADOPT, and in PARKED WithSocket; on the wire it is in the
	// message's descriptors. The holder of the message owns it. -1 or 0: none.
	Socket int `cbor:"-"`
}

// Blob is the shared state of a group, in ADOPT and PARKED.
type Blob struct {
	Group string `cbor:"1,keyasint"`
	Data  []byte `cbor:"2,keyasint,omitempty"`
	Large bool   `cbor:"3,keyasint,omitempty"`
}

// Schema is a state schema a worker announces: what it writes and can restore.
type Schema struct {
	Name     string   `cbor:"1,keyasint"`
	Writes   uint32   `cbor:"2,keyasint"`
	Restores []uint32 `cbor:"3,keyasint"`
}

// Hello is a worker's first message.
type Hello struct {
	Min     uint32   `cbor:"1,keyasint"` // oldest protocol version it speaks
	Max     uint32   `cbor:"2,keyasint"` // newest
	PID     int      `cbor:"3,keyasint"`
	Name    string   `cbor:"4,keyasint,omitempty"` // program and version, for people
	Schemas []Schema `cbor:"5,keyasint,omitempty"`
	Rekey   bool     `cbor:"6,keyasint,omitempty"` // it knows the messages about changes of keys
	// Able is what else it can do; bits that this version does not know mean nothing.
	Able Abilities `cbor:"7,keyasint,omitempty"`
}

// Welcome is the supervisor's answer to Hello.
type Welcome struct {
	Version       uint32 `cbor:"1,keyasint"`
	Worker        uint64 `cbor:"2,keyasint"`
	Pool          string `cbor:"3,keyasint"`
	Generation    uint32 `cbor:"4,keyasint"`
	FreezeTimeout int64  `cbor:"5,keyasint"`           // milliseconds
	Rekey         bool   `cbor:"6,keyasint,omitempty"` // the supervisor can change keys in this kernel
	// Arena is the size in bytes of the memory file that comes with the message, for the
	// worker's journals of its sessions (ktls.Arena); 0: none comes.
	Arena uint64 `cbor:"7,keyasint,omitempty"`
	// Keeper, if not 0, says that nobody keeps a duplicate of the sockets: PARKED brings
	// them back, and this process may take them from a worker that hangs.
	Keeper int `cbor:"8,keyasint,omitempty"`
	// Groups: the supervisor keeps checkpoints of groups.
	Groups bool `cbor:"9,keyasint,omitempty"`
}

// Refused says why a session could not be adopted.
type Refused struct {
	Ref
	Why string `cbor:"3,keyasint"`
}

// Reason says why a session ended.
type Reason uint8

// Reasons of CLOSED.
const (
	ReasonPeer       Reason = 1 // the peer closed, with close_notify
	ReasonOwner      Reason = 2 // the application closed
	ReasonPeerAbrupt Reason = 3 // reset, or FIN without close_notify
	ReasonProtocol   Reason = 4 // the peer broke TLS; an alert was sent or received
	ReasonKeyUpdate  Reason = 5 // this kernel cannot rekey; closed cleanly
	ReasonKeyLimit   Reason = 6 // the key's limit of use was reached; closed cleanly
	ReasonHandler    Reason = 7 // the handler failed or panicked
	ReasonOperator   Reason = 8 // CLOSE or STOP
	ReasonLayer      Reason = 9 // the record state was in doubt (I5)
	reasonMax               = ReasonLayer

	// Of the supervisor only.
	ReasonPoison Reason = 10 // workers died over it, again and again

	// LastReason is the highest of all.
	LastReason = ReasonPoison
)

var reasonNames = [...]string{0: "unknown", ReasonPeer: "peer closed", ReasonOwner: "application closed",
	ReasonPeerAbrupt: "peer went away without close_notify", ReasonProtocol: "TLS protocol error",
	ReasonKeyUpdate: "key update on a kernel that cannot rekey", ReasonKeyLimit: "limit of use of the key",
	ReasonHandler: "handler failed", ReasonOperator: "operator", ReasonLayer: "record state in doubt",
	ReasonPoison: "poison"}

func (r Reason) String() string {
	if int(r) < len(reasonNames) {
		return reasonNames[r]
	}
	return reasonNames[0]
}

// Closed reports the end of a session. Epoch is that of the ownership.
type Closed struct {
	Ref
	Reason Reason `cbor:"3,keyasint"`
	Text   string `cbor:"4,keyasint,omitempty"`
}

// Phase is a session's phase in a worker, as INVENTORY_REPLY reports it.
type Phase uint8

// Phases.
const (
	PhaseAdopted  Phase = 1 // taken, RESUME has not come
	PhaseActive   Phase = 2 // served
	PhaseFreezing Phase = 3 // on the way to a safe point; Attempt is set
	PhaseParked   Phase = 4 // PARKED was sent; Attempt is set
	PhaseClosed   Phase = 5 // ended, CLOSED_ACK has not come
)

// Held is one session in an inventory.
type Held struct {
	Ref            // Epoch of the ownership, or of the attempt that adopted it
	Phase   Phase  `cbor:"3,keyasint"`
	Attempt Epoch  `cbor:"4,keyasint,omitempty"`
	Group   string `cbor:"5,keyasint,omitempty"`
	Reason  Reason `cbor:"6,keyasint,omitempty"`
}

// Rekey is one session's part in a change of keys. Epoch is that of the ownership.
//
// The peer's KeyUpdate:  KEY_UPDATE -> the supervisor sets the next receiving key ->
// REKEYED. Ours: PAUSE -> PAUSED -> the supervisor notes the sequence number -> SEND ->
// SENT -> it sets the next sending key -> CONTINUE.
type Rekey struct {
	Ref
	// Count numbers the peer's KeyUpdates since the adoption, from 1: KEY_UPDATE,
	// REKEYED.
	Count uint64 `cbor:"3,keyasint,omitempty"`
	// Request: in KEY_UPDATE the peer wants an answer (also when that is not known);
	// in WANT_UPDATE, UPDATE and SEND the peer is to change its key as well.
	Request bool `cbor:"4,keyasint,omitempty"`
	// Failed says why something was not done: PAUSED, SENT. In REKEYED and CONTINUE the
	// key could not be set, and the session is to be closed with ReasonLayer.
	Failed string `cbor:"5,keyasint,omitempty"`
	// Record is what SEND wants sent as one record of type 22.
	Record []byte `cbor:"6,keyasint,omitempty"`
}

// Message is one message of the control channel. Which fields count depends on
// Type; the rest is empty.
type Message struct {
	Type    Type      `cbor:"0,keyasint"`
	Hello   *Hello    `cbor:"1,keyasint,omitempty"`
	Welcome *Welcome  `cbor:"2,keyasint,omitempty"`
	Items   []Item    `cbor:"3,keyasint,omitempty"`  // ADOPT, PARKED
	Blobs   []Blob    `cbor:"4,keyasint,omitempty"`  // ADOPT, PARKED
	Refs    []Ref     `cbor:"5,keyasint,omitempty"`  // ADOPTED FREEZE THAW RESUME RELEASE ABORT CLOSED_ACK CLOSE
	Refused []Refused `cbor:"6,keyasint,omitempty"`  // REFUSED
	Closed  []Closed  `cbor:"7,keyasint,omitempty"`  // CLOSED
	Held    []Held    `cbor:"8,keyasint,omitempty"`  // INVENTORY_REPLY
	Nonce   uint64    `cbor:"9,keyasint,omitempty"`  // INVENTORY, INVENTORY_REPLY, PING, PONG
	Last    bool      `cbor:"10,keyasint,omitempty"` // INVENTORY_REPLY: no more parts; ADOPT, PARKED, FREEZE, RESUME: no more members of the group in this attempt
	Group   string    `cbor:"11,keyasint,omitempty"` // GROUP, GROUPED; FREEZE, THAW, PARKED, ADOPT, RESUME: all members belong to this group and move as one
	Text    string    `cbor:"12,keyasint,omitempty"` // GROUPED: why the group cannot be joined; STOP: why
	Millis  int64     `cbor:"13,keyasint,omitempty"` // STOP: time to end the sessions
	Drain   bool      `cbor:"14,keyasint,omitempty"` // STOP: leave when no session is left, end none
	Rekeys  []Rekey   `cbor:"15,keyasint,omitempty"` // KEY_UPDATE REKEYED WANT_UPDATE PAUSE PAUSED SEND SENT CONTINUE UPDATE

	// Exposed: PONG: how many of its sessions a crash of this worker would cost, or cost
	// what they have committed, because there is no room for them in its arena.
	Exposed uint64 `cbor:"16,keyasint,omitempty"`

	// File is the memory file of MARKS, and of WELCOME with an arena: the message's one
	// descriptor. The holder of the message owns it.
	File int `cbor:"-"`
}
