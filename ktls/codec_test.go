package ktls

import (
	"bytes"
	"reflect"
	"testing"

	"github.com/fxamacker/cbor/v2"
)

// fill sets every field that has an encoding, so that one that encode or decode does not
// know shows. step varies the lengths of what is set.
func fill(v reflect.Value, step int) {
	for i := range v.NumField() {
		f := v.Field(i)
		if !f.CanSet() {
			continue
		}
		switch f.Kind() {
		case reflect.Int:
			f.SetInt(int64(i+1) << (step % 24))
		case reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
			f.SetUint(uint64(i+1) << (step % (f.Type().Bits() - 5)))
		case reflect.Bool:
			f.SetBool(step%2 == 0)
		case reflect.String:
			f.SetString(string(bytes.Repeat([]byte("é"), i*step)))
		case reflect.Slice:
			if f.Type().Elem().Kind() == reflect.Uint8 {
				f.SetBytes(bytes.Repeat([]byte{byte(i)}, 1+i*step*step))
			}
		case reflect.Pointer:
			p := reflect.New(f.Type().Elem())
			fill(p.Elem(), step)
			f.Set(p)
		}
	}
}

// Encoder and decoder of their own do what the general ones do, with every field, alone
// and together.
func TestRecordCodec(t *testing.T) {
	check := func(r *record) {
		t.Helper()
		want, err := cbor.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		got := r.encode(make([]byte, 0, r.size()))
		if !bytes.Equal(got, want) {
			t.Fatalf("%+v\nencoded %x\nwant    %x", r, got, want)
		}
		if cap(got) != r.size() && r.ID != nil {
			t.Errorf("size %d is too small for %d bytes", r.size(), len(got))
		}
		var fast decodedRecord
		var slow record
		if err := cborDecode.Unmarshal(want, &slow); err != nil {
			t.Fatal(err)
		}
		if !fast.read(want) && r.ID != nil {
			t.Errorf("left to the general decoder: %x", want)
		} else if r.ID != nil && !reflect.DeepEqual(fast.record, slow) {
			t.Errorf("decoded %+v\nwant    %+v", fast.record, slow)
		}
	}
	check(&record{})
	for step := range 60 {
		var all record
		fill(reflect.ValueOf(&all).Elem(), step)
		check(&all)
		for i := range reflect.TypeFor[record]().NumField() {
			one := record{ID: []byte("id")}
			reflect.ValueOf(&one).Elem().Field(i).Set(reflect.ValueOf(&all).Elem().Field(i))
			check(&one)
		}
	}
}

// The same for facts, of which certificates are left to the general decoder.
func TestFactsDecoder(t *testing.T) {
	for step := range 60 {
		var f facts
		fill(reflect.ValueOf(&f).Elem(), step)
		f.OCSP, f.TLSUnique = nil, nil
		b, err := cbor.Marshal(&f)
		if err != nil {
			t.Fatal(err)
		}
		var fast, slow facts
		if err := cborDecode.Unmarshal(b, &slow); err != nil {
			t.Fatal(err)
		}
		if !fast.decode(b) || !reflect.DeepEqual(fast, slow) {
			t.Errorf("decoded %+v\nwant    %+v", fast, slow)
		}
		f.OCSP = []byte("x")
		if b, err = cbor.Marshal(&f); err != nil {
			t.Fatal(err)
		}
		if fast.decode(b) {
			t.Error("took a field that it does not know")
		}
	}
}

// FuzzCodec: what the short way takes, the general one takes, and they make the same of it.
func FuzzCodec(f *testing.F) {
	for step := range 4 {
		var r record
		fill(reflect.ValueOf(&r).Elem(), step)
		f.Add(r.encode(nil))
		var x facts
		fill(reflect.ValueOf(&x).Elem(), step)
		if b, err := cbor.Marshal(&x); err == nil {
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var fast decodedRecord
		var slow record
		if fast.read(b) {
			if err := cborDecode.Unmarshal(b, &slow); err != nil || !reflect.DeepEqual(fast.record, slow) {
				t.Errorf("%x: %+v\nwant %+v, %v", b, fast.record, slow, err)
			}
		}
		var f1, f2 facts
		if f1.decode(b) {
			if err := cborDecode.Unmarshal(b, &f2); err != nil || !reflect.DeepEqual(f1, f2) {
				t.Errorf("%x: %+v\nwant %+v, %v", b, f1, f2, err)
			}
		}
	})
}
