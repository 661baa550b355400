package main

import (
	"fmt"

	"github.com/fxamacker/cbor/v2"

	"github.com/ktlsvisor/ktlsvisor/state"
)

// saved is what a member keeps when its session moves.
type saved struct {
	Nick   string
	Room   string // where the member is, or wants to be; "" for nowhere
	Joined bool   // the room knows
	Half   []byte // the line that is being typed
	Away   string // since version 2
}

// savedRoom is what a room keeps besides its members.
type savedRoom struct {
	History []string `cbor:"1,keyasint"` // the last lines, oldest first
}

// The encodings. One that was ever released never changes: testdata has an
// example of each, and the tests restore them.
type (
	savedV1 struct {
		Nick   string `cbor:"1,keyasint"`
		Room   string `cbor:"2,keyasint"`
		Joined bool   `cbor:"3,keyasint"`
		Half   []byte `cbor:"4,keyasint"`
	}
	savedV2 struct {
		Nick   string `cbor:"1,keyasint"`
		Room   string `cbor:"2,keyasint"`
		Joined bool   `cbor:"3,keyasint"`
		Half   []byte `cbor:"4,keyasint"`
		Away   string `cbor:"5,keyasint"`
	}
)

// schemas are the codecs of one release.
type schemas struct {
	version uint32
	member  *state.Schema[saved]
	room    *state.Schema[savedRoom]
}

func newSchemas(version string) (*schemas, error) {
	s := &schemas{room: state.NewSchema[savedRoom]("chat/room", 1)}
	const name = "chat/member"
	switch version {
	case "1":
		s.version = 1
		s.member = state.NewSchema(name, 1, state.WithCodec(
			func(v saved) ([]byte, error) {
				return cbor.Marshal(savedV1{Nick: v.Nick, Room: v.Room, Joined: v.Joined, Half: v.Half})
			},
			func(b []byte) (saved, error) {
				var v savedV1
				err := cbor.Unmarshal(b, &v)
				return saved{Nick: v.Nick, Room: v.Room, Joined: v.Joined, Half: v.Half}, err
			}))
	case "2":
		s.version = 2
		s.member = state.NewSchema(name, 2, state.WithCodec(
			func(v saved) ([]byte, error) { return cbor.Marshal(savedV2(v)) },
			func(b []byte) (saved, error) {
				var v savedV2
				err := cbor.Unmarshal(b, &v)
				return saved(v), err
			}))
		s.member.Migrate(1, func(b []byte) ([]byte, error) {
			var old savedV1
			if err := cbor.Unmarshal(b, &old); err != nil {
				return nil, err
			}
			// Nobody was away: version 1 had no such thing.
			return cbor.Marshal(savedV2{Nick: old.Nick, Room: old.Room, Joined: old.Joined, Half: old.Half})
		})
	default:
		return nil, fmt.Errorf("state version %q: there are 1 and 2; build with -ldflags \"-X main.stateVersion=2\"", version)
	}
	return s, nil
}

func (s *schemas) infos() []state.Info { return []state.Info{s.member.Info(), s.room.Info()} }
